package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/proc"
)

// controlFlags say what `bench control` measures.
type controlFlags struct {
	*benchFlags
	consul       string // the real one to measure beside it, or none
	parts        []string
	nodes        int    // simulated agents
	trials       int    // of a failover
	jobs, perJob int    // of the large state
	archive      string // that the large state comes from instead, or none
	calm         time.Duration
}

// controlParts are the measurements in the order in which they run.
var controlParts = []string{"writes", "failover", "state", "calm"}

func newBenchControl(b *benchFlags) *cobra.Command {
	c := controlFlags{benchFlags: b}
	cmd := &cobra.Command{
		Use:   "control",
		Short: "Writes, failover and a large state on three servers",
		Long: `Starts three servers of its own with the shipped defaults (TLS, ACL, fsync, metrics)
on free ports of this machine, with simulated agents (bench nodes), and measures

  writes    accepted registrations per second at 1, 8, 32 and 64 clients, beside
            three real nomad servers when --nomad names one, and consul likewise
  failover  kill -9 of the leader to the first accepted write
  state     memory, snapshot, restart and restore with many allocations: of jobs
            registered here, or of the region whose archive --archive names
            (rxvision snapshot save), without its agents
  calm      leader changes under full load for a long time (not by default)`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, p := range c.parts {
				if !slices.Contains(controlParts, p) {
					return fmt.Errorf("--part %q: use %s", p, strings.Join(controlParts, ", "))
				}
			}
			return runBenchControl(cmd.Context(), c, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.nomad, "nomad", "", "the real nomad to measure beside it; default: none")
	f.StringVar(&c.consul, "consul", "", "the real consul to measure beside it; default: none")
	f.StringSliceVar(&c.parts, "part", []string{"writes", "failover", "state"}, "what to measure: "+strings.Join(controlParts, ", "))
	f.IntVar(&c.nodes, "nodes", 1000, "simulated agents during failovers")
	f.IntVar(&c.trials, "trials", 50, "failovers")
	f.IntVar(&c.jobs, "jobs", 100_000, "jobs of the large state")
	f.IntVar(&c.perJob, "allocations", 10, "allocations of each")
	f.StringVar(&c.archive, "archive", "", "archive of a region to measure as the large state; default: one filled here")
	f.DurationVar(&c.calm, "calm", 30*time.Minute, "how long the load of calm lasts")
	return cmd
}

func runBenchControl(ctx context.Context, c controlFlags, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "rxvision-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &benchRun{out: out}
	for _, part := range controlParts {
		if !slices.Contains(c.parts, part) {
			continue
		}
		own := filepath.Join(dir, part)
		if err := os.MkdirAll(own, 0o700); err != nil {
			return err
		}
		measure := map[string]func(context.Context, controlFlags, *benchRun, string) error{
			"writes": benchWrites, "failover": benchFailover, "state": benchState, "calm": benchCalm,
		}[part]
		if err := measure(ctx, c, r, own); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}
	return r.write(*c.benchFlags)
}

// controlPlane is three servers as operators run them, each a process.
type controlPlane struct {
	dir     string
	servers []*benchServer
	client  *http.Client
	token   string
}

type benchServer struct {
	name            string
	http, rpc, raft string
	args            []string
	proc            *proc.Process
}

// startControlPlane starts n servers and makes the management token.
func startControlPlane(ctx context.Context, dir string, n int) (_ *controlPlane, err error) {
	p := &controlPlane{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.stop(context.WithoutCancel(ctx)))
		}
	}()
	if err := p.self(ctx, "tls", "ca", "create"); err != nil {
		return nil, err
	}
	var join []string
	for i := range n {
		s := &benchServer{name: fmt.Sprintf("s%d", i+1)}
		for _, addr := range []*string{&s.http, &s.rpc, &s.raft} {
			if *addr, err = freeLoopback(); err != nil {
				return nil, err
			}
		}
		if err := p.self(ctx, "tls", "cert", "create", "--server", "--name", s.name); err != nil {
			return nil, err
		}
		join = append(join, "--retry-join", s.raft)
		p.servers = append(p.servers, s)
	}
	for _, s := range p.servers {
		s.args = append([]string{
			"server", "--name", s.name, "--data-dir", filepath.Join(dir, s.name), "--bootstrap-expect", strconv.Itoa(n),
			"--http-addr", s.http, "--rpc-addr", s.rpc, "--raft-addr", s.raft,
			"--tls-ca", "ca.pem", "--tls-cert", s.name + ".pem", "--tls-key", s.name + "-key.pem",
			"--node-ca-cert", "node-ca.pem", "--node-ca-key", "node-ca-key.pem", "--log-level", "warn",
		}, join...)
		if err := p.start(s); err != nil {
			return nil, err
		}
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	p.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 128}}
	if _, err := p.leader(ctx); err != nil {
		return nil, err
	}
	if err := p.bootstrap(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// bootstrap makes the management token, once more when there has been one: whoever
// can write the servers' folders may.
func (p *controlPlane) bootstrap(ctx context.Context) error {
	var token struct{ SecretID string }
	s := p.servers[0]
	p.token = ""
	try := func() error { return p.call(ctx, http.MethodPut, s, "/v1/acl/bootstrap", "", &token) }
	err := try()
	var index uint64
	if r := (*refusal)(nil); errors.As(err, &r) {
		if _, told, ok := strings.Cut(r.text, "(reset index: "); ok {
			if _, err := fmt.Sscan(told, &index); err != nil {
				return fmt.Errorf("%q: %w", r.text, err)
			}
			if err := os.WriteFile(filepath.Join(p.dir, s.name, bootstrapResetFile), []byte(strconv.FormatUint(index, 10)), 0o600); err != nil {
				return err
			}
			err = try()
		}
	}
	p.token = token.SecretID
	return err
}

// self runs this program to its end in the control plane's folder.
func (p *controlPlane) self(ctx context.Context, args ...string) error {
	child, err := p.spawn("once", args...)
	if err != nil {
		return err
	}
	defer child.Detach()
	status, err := child.Wait(ctx)
	if err != nil {
		return err
	}
	if status.Code != 0 {
		return fmt.Errorf("rxvision %s: %s", strings.Join(args, " "), lastLine(filepath.Join(p.dir, "once.0")))
	}
	return nil
}

// spawn starts this program; what it prints goes to NAME.0.
func (p *controlPlane) spawn(name string, args ...string) (*proc.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	logs := proc.LogFiles{Dir: p.dir, Name: name}
	return proc.Start(proc.Spec{
		Path: self, Args: args, Env: append(os.Environ(), "NOMAD_TOKEN="+p.token), Dir: p.dir, Stdout: logs, Stderr: logs,
		StatusFile: filepath.Join(p.dir, name+".status"), DieWithParent: true,
	})
}

func (p *controlPlane) start(s *benchServer) (err error) {
	s.proc, err = p.spawn(s.name, s.args...)
	return err
}

// kill ends a server as kill -9 does.
func (p *controlPlane) kill(ctx context.Context, s *benchServer) error {
	if err := s.proc.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	_, err := s.proc.Wait(ctx)
	s.proc.Detach()
	s.proc = nil
	return err
}

func (p *controlPlane) stop(ctx context.Context) error {
	var faults []error
	for _, s := range p.servers {
		if s.proc != nil {
			_, err := s.proc.Stop(ctx, syscall.SIGINT, 10*time.Second)
			s.proc.Detach()
			s.proc = nil
			faults = append(faults, err)
		}
	}
	if p.client != nil {
		p.client.CloseIdleConnections()
	}
	return errors.Join(faults...)
}

// call makes one request and reads a JSON answer into out, when that is not nil.
func (p *controlPlane) call(ctx context.Context, method string, s *benchServer, path, body string, out any) error {
	var send io.Reader
	if body != "" {
		send = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+s.http+path, send)
	if err != nil {
		return err
	}
	if p.token != "" {
		req.Header.Set("X-Nomad-Token", p.token)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err
	case resp.StatusCode != http.StatusOK:
		seconds, _ := strconv.Atoi(resp.Header.Get("Retry-After")) // 0: it does not say
		return &refusal{resp.StatusCode, time.Duration(seconds) * time.Second, fmt.Sprintf("%s %s: %s: %s", method, path, resp.Status, answer)}
	case out == nil:
		return nil
	}
	return json.Unmarshal(answer, out)
}

// refusal is an answer other than 200.
type refusal struct {
	status int
	after  time.Duration // what Retry-After says
	text   string
}

func (r *refusal) Error() string { return r.text }

// later says whether it is to be tried later. That nobody leads is a 500, as nomad has it.
func (r *refusal) later() bool {
	switch r.status {
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		return true
	}
	return r.status == http.StatusInternalServerError && strings.Contains(r.text, "No cluster leader")
}

// How a call goes on that a server has no time for: for how long, and the pauses, which double.
const (
	patience   = 2 * time.Minute
	firstPause = 50 * time.Millisecond
	longPause  = 2 * time.Second
)

// insist makes a call again while a server answers that it shall be tried later; any other error ends it. The call may have
// been carried out all the same, so it must be one that can be made twice.
func insist(ctx context.Context, call func() error) error {
	began := time.Now()
	for pause := firstPause; ; pause = min(2*pause, longPause) {
		err := call()
		var r *refusal
		if !errors.As(err, &r) || !r.later() {
			return err
		}
		wait := max(pause, r.after)
		if time.Since(began)+wait > patience {
			return fmt.Errorf("not accepted within %s: %w", patience, err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

// leader waits until a majority names the same leader.
func (p *controlPlane) leader(ctx context.Context) (*benchServer, error) {
	for {
		votes := map[string]int{}
		for _, s := range p.servers {
			var address string
			if s.proc != nil && p.call(ctx, http.MethodGet, s, "/v1/status/leader?stale", "", &address) == nil {
				votes[address]++
			}
		}
		for _, s := range p.servers {
			if votes[s.raft] > len(p.servers)/2 {
				return s, nil
			}
		}
		for _, s := range p.servers {
			if s.proc == nil {
				continue
			}
			select {
			case <-s.proc.Done():
				return nil, fmt.Errorf("server %s ended: %s", s.name, lastLine(filepath.Join(p.dir, s.name+".0")))
			default:
			}
		}
		if err := pause(ctx); err != nil {
			return nil, fmt.Errorf("wait for a leader: %w", err)
		}
	}
}

// introduce makes a token by which so many agents enrol.
func (p *controlPlane) introduce(ctx context.Context, agents int) (string, error) {
	var token struct{ Secret string }
	err := p.call(ctx, http.MethodPut, p.servers[0], "/v1/intro-tokens", fmt.Sprintf(`{"Uses":%d,"TTL":"1h"}`, agents), &token)
	return token.Secret, err
}

// attach starts simulated agents on all servers and waits until all are there.
func (p *controlPlane) attach(ctx context.Context, count int) (detach func() error, err error) {
	token, err := p.introduce(ctx, count)
	if err != nil {
		return nil, err
	}
	secret := filepath.Join(p.dir, "intro-token")
	if err := os.WriteFile(secret, []byte(token), 0o600); err != nil {
		return nil, err
	}
	args := []string{"bench", "nodes", "--count", strconv.Itoa(count), "--ca", "ca.pem", "--intro-token-file", secret}
	for _, s := range p.servers {
		args = append(args, "--server", s.rpc)
	}
	child, err := p.spawn("nodes", args...)
	if err != nil {
		return nil, err
	}
	detach = func() error {
		_, err := child.Stop(context.WithoutCancel(ctx), syscall.SIGINT, 10*time.Second)
		child.Detach()
		return err
	}
	for {
		var nodes []struct{ Status string }
		if err := p.call(ctx, http.MethodGet, p.servers[0], "/v1/nodes?stale", "", &nodes); err == nil {
			ready := 0
			for _, n := range nodes {
				if n.Status == "ready" {
					ready++
				}
			}
			if ready >= count {
				return detach, nil
			}
		}
		select {
		case <-child.Done():
			return nil, errors.Join(fmt.Errorf("the simulated agents ended: %s", lastLine(filepath.Join(p.dir, "nodes.0"))), detach())
		default:
		}
		if err := pause(ctx); err != nil {
			return nil, errors.Join(err, detach())
		}
	}
}

// benchJob is a service of n allocations.
func benchJob(id string, n int, datacenter string) string {
	return benchWork(cluster.JobTypeService, id, n, datacenter)
}

// benchWork is a job of n allocations.
func benchWork(kind, id string, n int, datacenter string) string {
	return fmt.Sprintf(`{"Job":{"ID":%q,"Name":%q,"Type":%q,"Datacenters":[%q],"TaskGroups":[{"Name":"g","Count":%d,"Tasks":[{"Name":"t","Driver":"raw_exec","Config":{"command":"/bin/true"},"Resources":{"CPU":10,"MemoryMB":10}}]}]}}`, id, id, kind, datacenter, n)
}

var controlClients = []int{1, 8, 32, 64}

// serials number the jobs of a run.
var serials atomic.Int64

// registrations measures accepted registrations of distinct jobs of one
// allocation at each number of clients, spread over the servers.
func registrations(ctx context.Context, each time.Duration, datacenter string, put func(ctx context.Context, client int, id, job string) error) (map[int]sample, error) {
	out := map[int]sample{}
	for _, n := range controlClients {
		s, err := closedLoop(ctx, n, each, func(ctx context.Context, client int) error {
			id := fmt.Sprintf("bench-%d", serials.Add(1))
			return put(ctx, client, id, benchJob(id, 1, datacenter))
		})
		if err != nil {
			return nil, err
		}
		out[n] = s
	}
	return out, nil
}

// benchWrites measures accepted writes: first with no node, as the peer does, so
// that the servers alone are measured; then with 100 agents that take the work.
func benchWrites(ctx context.Context, c controlFlags, r *benchRun, dir string) (err error) {
	p, err := startControlPlane(ctx, dir, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	put := func(ctx context.Context, client int, _, job string) error {
		return p.call(ctx, http.MethodPut, p.servers[client%len(p.servers)], "/v1/jobs", job, nil)
	}
	idle, err := registrations(ctx, c.each, "nowhere", put)
	if err != nil {
		return err
	}
	detach, err := p.attach(ctx, 100)
	if err != nil {
		return err
	}
	busy, err := registrations(ctx, c.each, "dc1", put)
	if err = errors.Join(err, detach()); err != nil {
		return err
	}
	if err := p.stop(ctx); err != nil {
		return err
	}
	names, rates := []string{""}, []map[int]sample{{}} // without a peer the figures stand alone
	for i, other := range c.peers() {
		rate, err := other.writes(ctx, c.each, dir)
		if err != nil {
			return fmt.Errorf("%s: %w", other.name, err)
		}
		names, rates = append(names[:i], other.name), append(rates[:i], rate)
	}
	for _, n := range controlClients {
		for i, name := range names {
			of := fmt.Sprintf("3 servers, no nodes, %d clients: ", n)
			r.add(figure{Metric: of + "accepted jobs/s", Value: idle[n].perSecond, Unit: "1/s", Peer: name, PeerValue: rates[i][n].perSecond})
			r.add(figure{Metric: of + "p99", Value: ms(idle[n].p99), Unit: "ms", Peer: name, PeerValue: ms(rates[i][n].p99)})
		}
	}
	for _, n := range controlClients {
		f := figure{Metric: fmt.Sprintf("3 servers, 100 nodes, %d clients: accepted jobs/s", n), Value: busy[n].perSecond, Unit: "1/s"}
		if n == 32 {
			f.Target = "4290"
		}
		r.add(f)
		r.add(figure{Metric: fmt.Sprintf("3 servers, 100 nodes, %d clients: p99", n), Value: ms(busy[n].p99), Unit: "ms"})
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// benchFailover measures kill -9 of the leader to the first write that a survivor
// accepts, a client trying both every 10 ms, with agents attached.
func benchFailover(ctx context.Context, c controlFlags, r *benchRun, dir string) (err error) {
	p, err := startControlPlane(ctx, dir, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	detach, err := p.attach(ctx, c.nodes)
	if err != nil {
		return err
	}
	all, err := failovers(ctx, c.trials, r.out, p.failover)
	if err != nil {
		return errors.Join(err, detach())
	}
	if err := errors.Join(detach(), p.stop(ctx)); err != nil {
		return err
	}
	name := fmt.Sprintf("failover, %d agents attached, %d trials: ", c.nodes, c.trials)
	names, peers := []string{""}, [][]time.Duration{{0}}
	for i, other := range c.peers() {
		all, err := other.failovers(ctx, c.trials, dir, r.out)
		if err != nil {
			return fmt.Errorf("%s: %w", other.name, err)
		}
		names, peers = append(names[:i], other.name+", no agents"), append(peers[:i], all)
	}
	for _, q := range []struct {
		name, target string
		percent      int
	}{{"p50", "1000", 50}, {"p99", "2000", 99}, {"max", "", 100}} {
		for i, peer := range names {
			r.add(figure{Metric: name + q.name, Value: ms(quantile(all, q.percent)), Unit: "ms", Target: q.target, Peer: peer, PeerValue: ms(quantile(peers[i], q.percent))})
		}
	}
	return nil
}

// failovers measures some, one after another.
func failovers(ctx context.Context, trials int, out io.Writer, one func(context.Context) (time.Duration, error)) ([]time.Duration, error) {
	var all []time.Duration
	for trial := range trials {
		took, err := one(ctx)
		if err != nil {
			return nil, fmt.Errorf("trial %d: %w", trial+1, err)
		}
		all = append(all, took)
		fmt.Fprintf(out, "\rfailover %d of %d: %s   ", trial+1, trials, took.Round(time.Millisecond))
	}
	fmt.Fprintln(out)
	return all, nil
}

// firstAccepted tries a write at each of the survivors every 10 ms and gives the
// time since began when the first was accepted.
func firstAccepted(ctx context.Context, began time.Time, survivors []func(context.Context) error) (time.Duration, error) {
	tries, cancel := context.WithTimeout(ctx, time.Minute)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	accepted := make(chan time.Duration, len(survivors))
	for _, write := range survivors {
		clients.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for {
				if write(tries) == nil {
					accepted <- time.Since(began)
					return
				}
				select {
				case <-tick.C:
				case <-tries.Done():
					return
				}
			}
		})
	}
	select {
	case took := <-accepted:
		return took, nil
	case <-tries.Done():
		return 0, errors.New("no write was accepted within a minute")
	}
}

// quantile gives the value that percent of all are not above.
func quantile(all []time.Duration, percent int) time.Duration {
	all = slices.Sorted(slices.Values(all))
	return all[max(0, (len(all)*percent+99)/100-1)]
}

// failover kills the leader, measures, and brings the killed server back.
func (p *controlPlane) failover(ctx context.Context) (time.Duration, error) {
	dead, err := p.leader(ctx)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := p.kill(ctx, dead); err != nil {
		return 0, err
	}
	body := benchJob(fmt.Sprintf("failover-%d", serials.Add(1)), 1, "nowhere")
	var survivors []func(context.Context) error
	for _, s := range p.servers {
		if s != dead {
			survivors = append(survivors, func(ctx context.Context) error {
				return p.call(ctx, http.MethodPut, s, "/v1/jobs", body, nil)
			})
		}
	}
	took, err := firstAccepted(ctx, began, survivors)
	if err != nil {
		return 0, err
	}
	if err := p.start(dead); err != nil {
		return 0, err
	}
	return took, p.healthy(ctx)
}

// healthy waits until the leader calls all servers healthy voters.
func (p *controlPlane) healthy(ctx context.Context) error {
	for {
		for _, s := range p.servers {
			var h struct {
				Healthy bool
				Voters  []string
			}
			if p.call(ctx, http.MethodGet, s, "/v1/operator/autopilot/health", "", &h) == nil && h.Healthy && len(h.Voters) == len(p.servers) {
				return nil
			}
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("wait for healthy servers: %w", err)
		}
	}
}
