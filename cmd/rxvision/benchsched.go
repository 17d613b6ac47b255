package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/swarm"
	"github.com/rxvision/rxvision/pki"
)

// schedFlags say what `bench sched` measures.
type schedFlags struct {
	*benchFlags
	parts          []string
	servers, nodes []int
	rate           int // jobs offered a second
	allocs         int // of the job of many
	holdNodes      int
	holdAllocs     int
}

// schedParts are the measurements in the order in which they run.
var schedParts = []string{"rate", "steady", "array", "hold"}

func newBenchSched(b *benchFlags) *cobra.Command {
	c := schedFlags{benchFlags: b}
	cmd := &cobra.Command{
		Use:   "sched",
		Short: "Jobs placed per second, from the API through Raft to the agents",
		Long: `Starts servers of its own with the shipped defaults (TLS, ACL, fsync, metrics) on free
ports of this machine, with simulated agents over the real streams, and measures
jobs of one allocation from their registration until the agent has the allocation,
for each number of servers and of agents:

  rate    as many as 32 clients can register, each waiting for its answers
  steady  --rate a second, whatever the answers take
  array   one batch job of --allocations, with the first number of agents
  hold    not by default: one server, --hold-nodes and --hold-allocations, in array
          jobs: memory, an idle server's processor time, registrations beside them,
          archive, restart, restore

Each part says what processor time an allocation took of each server, and of agents and
clients together, which rates leave open on a machine that does other things.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var faults []error
			for _, p := range c.parts {
				if !slices.Contains(schedParts, p) {
					faults = append(faults, fmt.Errorf("--part %q: use %s", p, strings.Join(schedParts, ", ")))
				}
			}
			for _, n := range c.servers {
				if n != 1 && n != 3 && n != 5 {
					faults = append(faults, fmt.Errorf("--servers %d: use 1, 3 or 5", n))
				}
			}
			for _, n := range c.nodes {
				if n < 1 || n > swarm.MaxNodes {
					faults = append(faults, fmt.Errorf("--nodes %d: use 1 to %d", n, swarm.MaxNodes))
				}
			}
			if c.holdNodes < 1 || c.holdNodes > swarm.MaxNodes || c.holdAllocs < 1 {
				faults = append(faults, fmt.Errorf("--hold-nodes are 1 to %d, --hold-allocations 1 at least", swarm.MaxNodes))
			}
			if c.rate < 1 || c.allocs < 1 || len(c.servers) == 0 || len(c.nodes) == 0 {
				faults = append(faults, errors.New("--rate and --allocations are 1 at least, --servers and --nodes name one number at least"))
			}
			if len(faults) > 0 {
				return errors.Join(faults...)
			}
			return runBenchSched(cmd.Context(), c, &benchRun{out: cmd.OutOrStdout()})
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&c.parts, "part", schedParts[:3], "what to measure: "+strings.Join(schedParts, ", "))
	f.IntSliceVar(&c.servers, "servers", []int{1, 3}, "numbers of servers")
	f.IntSliceVar(&c.nodes, "nodes", []int{100, 1000}, "numbers of simulated agents")
	f.IntVar(&c.rate, "rate", 1000, "jobs offered a second")
	f.IntVar(&c.allocs, "allocations", 50_000, "allocations of the job of many")
	f.IntVar(&c.holdNodes, "hold-nodes", 10_000, "simulated agents of hold")
	f.IntVar(&c.holdAllocs, "hold-allocations", 1_000_000, "allocations that hold fills the region with")
	return cmd
}

func runBenchSched(ctx context.Context, c schedFlags, r *benchRun) (err error) {
	dir, err := os.MkdirTemp("", "rxvision-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // as little as may be of the two cores for agents and clients
	}
	if slices.Contains(c.parts, "hold") {
		own := filepath.Join(dir, "hold")
		if err := errors.Join(os.Mkdir(own, 0o700), c.hold(ctx, r, own)); err != nil {
			return fmt.Errorf("hold: %w", err)
		}
	}
	parts := slices.DeleteFunc(slices.Clone(c.parts), func(p string) bool { return p == "hold" })
	if len(parts) == 0 {
		return r.write(*c.benchFlags)
	}
	for _, servers := range c.servers {
		for i, nodes := range c.nodes {
			own := filepath.Join(dir, fmt.Sprint(servers, "-", nodes))
			if err := os.Mkdir(own, 0o700); err != nil {
				return err
			}
			these := slices.Clone(parts)
			if i > 0 {
				these = slices.DeleteFunc(these, func(p string) bool { return p == "array" })
			}
			if err := c.region(ctx, r, own, servers, nodes, these); err != nil {
				return fmt.Errorf("%d servers, %d nodes: %w", servers, nodes, err)
			}
		}
	}
	return r.write(*c.benchFlags)
}

// region measures on one region.
func (c *schedFlags) region(ctx context.Context, r *benchRun, dir string, servers, nodes int, parts []string) (err error) {
	p, err := startControlPlane(ctx, dir, servers)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	arrived := &arrivals{sent: map[string]time.Time{}}
	detach, err := p.enlist(ctx, nodes, arrived.take)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach()) }()
	name := fmt.Sprintf("%d servers, %d nodes", servers, nodes)
	if servers == 1 {
		name = fmt.Sprintf("1 server, %d nodes", nodes)
	}
	for _, part := range parts {
		s := &schedRun{schedFlags: c, p: p, r: r, arrivals: arrived, name: name}
		measure := map[string]func(context.Context) error{"rate": s.placed, "steady": s.steady, "array": s.array}[part]
		if err := s.costs(ctx, part, measure); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}
	return nil
}

// costs runs a measurement and adds what processor time an allocation took of it: rates depend on what else the machine
// does, this hardly.
func (s *schedRun) costs(ctx context.Context, part string, measure func(context.Context) error) error {
	before, err := s.p.spent(ctx)
	if err != nil {
		return err
	}
	own := ownTime()
	if err := measure(ctx); err != nil {
		return err
	}
	own = ownTime() - own
	after, err := s.p.spent(ctx)
	if err != nil {
		return err
	}
	leader, err := s.p.leader(ctx)
	if err != nil {
		return err
	}
	each := func(who string, spent time.Duration) {
		s.r.add(figure{Metric: s.name + ", " + part + ": processor time per allocation, " + who, Value: float64(spent.Microseconds()) / float64(len(s.took)), Unit: "µs"})
	}
	for i, server := range s.p.servers {
		who := server.name
		if server == leader {
			who += " (leader)"
		}
		each(who, after[i]-before[i])
	}
	each("agents and clients", own)
	return nil
}

// spent is the processor time that each server has taken.
func (p *controlPlane) spent(ctx context.Context) ([]time.Duration, error) {
	var out []time.Duration
	for _, s := range p.servers {
		m, err := p.metrics(ctx, s)
		if err != nil {
			return nil, err
		}
		out = append(out, time.Duration(m["process_cpu_seconds_total"]*float64(time.Second)))
	}
	return out, nil
}

// ownTime is the processor time that this process has taken.
func ownTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // fails for wrong arguments only
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// enlist attaches simulated agents of this process and waits until all are there.
func (p *controlPlane) enlist(ctx context.Context, count int, taken func(*cluster.Allocation)) (detach func() error, err error) {
	token, err := p.introduce(ctx, count)
	if err != nil {
		return nil, err
	}
	m, err := pki.Load(pki.Config{CA: filepath.Join(p.dir, "ca.pem"), Region: "global", Role: pki.RoleNode, MayLack: true, Use: "wire"})
	if err != nil {
		return nil, err
	}
	cfg := swarm.Config{Count: count, Work: time.Hour, Taken: taken}
	for _, s := range p.servers {
		cfg.Servers = append(cfg.Servers, s.rpc)
	}
	cfg.Identity = (&enroller{servers: cfg.Servers, token: token, wire: m.Anonymous(pki.Only(pki.RoleServer))}).identity
	s, err := swarm.New(cfg)
	if err != nil {
		return nil, err
	}
	attached, leave := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(attached) }()
	detach = func() error {
		leave()
		return <-done
	}
	for s.Stats().Attached < count {
		if err := pause(ctx); err != nil {
			return nil, errors.Join(err, s.Problem(), detach())
		}
	}
	return detach, nil
}

// arrivals notes when jobs were sent and when agents were told of their allocations.
type arrivals struct {
	mu   sync.Mutex
	sent map[string]time.Time // by job
	took []time.Duration      // from sent
	last time.Time
}

func (a *arrivals) send(job string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sent[job] = time.Now()
}

func (a *arrivals) take(alloc *cluster.Allocation) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if sent, ok := a.sent[alloc.JobID]; ok {
		a.last = time.Now()
		a.took = append(a.took, a.last.Sub(sent))
	}
}

// schedRun is one measurement on a region.
type schedRun struct {
	*schedFlags
	*arrivals
	p    *controlPlane
	r    *benchRun
	name string

	mu   sync.Mutex
	seen []time.Duration // until the API showed the allocation, of some jobs
}

// The API is asked for the allocations of every so manieth job.
const sampled = 25

// schedClients register jobs at once.
const schedClients = 32

// register sends the job of the number n and, of some, waits in watch for its allocation to show.
func (s *schedRun) register(ctx context.Context, n int, watch *sync.WaitGroup) error {
	id := fmt.Sprintf("bench-%d", serials.Add(1))
	server := s.p.servers[n%len(s.p.servers)]
	began := time.Now()
	s.send(id)
	if err := s.p.call(ctx, http.MethodPut, server, "/v1/jobs", benchJob(id, 1, "dc1"), nil); err != nil {
		return err
	}
	if n%sampled == 0 {
		watch.Go(func() {
			for {
				var allocs []struct{ CreateIndex uint64 }
				err := s.p.call(ctx, http.MethodGet, server, "/v1/job/"+id+"/allocations?stale&wait=60s&index=1", "", &allocs)
				if err == nil && len(allocs) > 0 {
					s.mu.Lock()
					defer s.mu.Unlock()
					s.seen = append(s.seen, time.Since(began))
					return
				}
				if err != nil && pause(ctx) != nil {
					return
				}
			}
		})
	}
	return nil
}

// begin forgets the measurement before.
func (s *schedRun) begin() {
	s.arrivals.mu.Lock()
	defer s.arrivals.mu.Unlock()
	clear(s.sent)
	s.took = nil
}

// wait waits until n allocations have arrived.
func (s *schedRun) wait(ctx context.Context, what string, n int) error {
	progress := &bar{w: s.r.out, what: s.name + " " + what, amount: func(total int64) string { return fmt.Sprintf("of %d allocations", total) }}
	for {
		s.arrivals.mu.Lock()
		have := len(s.took)
		s.arrivals.mu.Unlock()
		progress.set(int64(have), int64(n))
		if have >= n {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("%d of %d allocations arrived: %w", have, n, err)
		}
	}
}

// quantiles adds p50 and p99 of what it took until agents had the allocations and until the API showed them.
func (s *schedRun) quantiles(what, target string) {
	for _, of := range []struct {
		end string
		all []time.Duration
	}{{"received", s.took}, {"shown", s.seen}} {
		if len(of.all) == 0 {
			continue
		}
		s.r.add(figure{Metric: s.name + ", " + what + ": to " + of.end + ", p50", Value: ms(quantile(of.all, 50)), Unit: "ms"})
		s.r.add(figure{Metric: s.name + ", " + what + ": to " + of.end + ", p99", Value: ms(quantile(of.all, 99)), Unit: "ms", Target: target})
	}
}

// placed measures what the region takes from clients that each wait for their answers.
func (s *schedRun) placed(ctx context.Context) error {
	s.begin()
	ctx, end := context.WithCancel(ctx)
	defer end()
	var watch sync.WaitGroup
	var jobs atomic.Int64
	began := time.Now()
	accepted, err := closedLoop(ctx, schedClients, s.each, func(ctx context.Context, _ int) error { return s.register(ctx, int(jobs.Add(1)), &watch) })
	if err == nil {
		err = s.wait(ctx, "rate", int(jobs.Load()))
	}
	if err != nil {
		end()
	}
	watch.Wait()
	if err != nil {
		return err
	}
	n := len(s.took)
	s.r.add(figure{Metric: s.name + ", 32 clients: accepted jobs/s", Value: accepted.perSecond, Unit: "1/s"})
	s.r.add(figure{Metric: s.name + ", 32 clients: placed jobs/s", Value: float64(n) / s.last.Sub(began).Seconds(), Unit: "1/s", Target: "2000"})
	s.quantiles("32 clients", "")
	return nil
}

// steady offers jobs at a rate.
func (s *schedRun) steady(ctx context.Context) (err error) {
	s.begin()
	ctx, end := context.WithCancel(ctx)
	defer end()
	const most = 512 // calls at once: beyond it the rate is not kept, and said so
	var watch, calls sync.WaitGroup
	slots := make(chan struct{}, most)
	failed := make(chan error, 1)
	n := int(s.each.Seconds() * float64(s.rate))
	began := time.Now()
	for i := range n {
		select {
		case <-time.After(time.Until(began.Add(time.Duration(i) * time.Second / time.Duration(s.rate)))):
		case <-ctx.Done():
			calls.Wait()
			watch.Wait()
			return ctx.Err()
		}
		slots <- struct{}{}
		calls.Go(func() {
			defer func() { <-slots }()
			if err := s.register(ctx, i, &watch); err != nil {
				select {
				case failed <- err:
				default:
				}
			}
		})
	}
	offered := float64(n) / time.Since(began).Seconds()
	calls.Wait()
	select {
	case err = <-failed:
	default:
		err = s.wait(ctx, "steady", n)
	}
	if err != nil {
		end()
	}
	watch.Wait()
	if err != nil {
		return err
	}
	what := strconv.Itoa(s.rate) + " jobs/s offered"
	s.r.add(figure{Metric: s.name + ", " + what + ": sent", Value: offered, Unit: "1/s"})
	s.quantiles(what, "1000")
	return nil
}

// array measures one job of many allocations.
func (s *schedRun) array(ctx context.Context) error {
	s.begin()
	id := fmt.Sprintf("bench-%d", serials.Add(1))
	s.send(id)
	began := time.Now()
	if err := s.p.call(ctx, http.MethodPut, s.p.servers[0], "/v1/jobs", benchWork(cluster.JobTypeBatch, id, s.allocs, "dc1"), nil); err != nil {
		return err
	}
	if err := s.wait(ctx, "array", s.allocs); err != nil {
		return err
	}
	s.r.add(figure{Metric: fmt.Sprintf("%s, one job of %d: placed allocations/s", s.name, s.allocs), Value: float64(s.allocs) / s.last.Sub(began).Seconds(), Unit: "1/s", Target: "20000"})
	return nil
}
