package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore"
)

// benchState brings a region to its size and measures what a server needs for it:
// by the real path, jobs over the API and allocations run by simulated agents, or
// out of an archive.
func benchState(ctx context.Context, c controlFlags, r *benchRun, dir string) (err error) {
	allocs := c.jobs * c.perJob
	if c.archive != "" {
		if allocs, err = archivedAllocs(c.archive); err != nil {
			return err
		}
	}
	p, err := startControlPlane(ctx, dir, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	empty, err := p.metrics(ctx, p.servers[0])
	if err != nil {
		return err
	}
	detach := func() error { return nil }
	if c.archive != "" {
		err = p.benchRestore(ctx, r, c.archive)
	} else {
		if detach, err = p.attach(ctx, c.nodes); err != nil {
			return err
		}
		detach = sync.OnceValue(detach)
		defer func() { err = errors.Join(err, detach()) }()
		began := time.Now()
		err = p.fill(ctx, c, r.out)
		r.add(figure{Metric: fmt.Sprintf("%d jobs registered and %d allocations running", c.jobs, allocs), Value: time.Since(began).Seconds(), Unit: "s"})
	}
	if err != nil {
		return err
	}
	for _, s := range p.servers {
		m, err := p.metrics(ctx, s)
		if err != nil {
			return err
		}
		heap := m["go_gc_heap_live_bytes"] - empty["go_gc_heap_live_bytes"]
		r.add(figure{Metric: s.name + ": live heap per allocation", Value: heap / float64(allocs), Unit: "B", Target: "2048"})
		r.add(figure{Metric: s.name + ": resident memory", Value: m["process_resident_memory_bytes"] / (1 << 20), Unit: "MiB"})
	}
	saved := filepath.Join(dir, "state.snap")
	if err := p.benchSave(ctx, c, r, saved); err != nil {
		return err
	}
	if err := detach(); err != nil {
		return err
	}
	if err := p.benchRestart(ctx, r); err != nil || c.archive != "" {
		return err
	}
	if err := p.stop(ctx); err != nil {
		return err
	}
	fresh := filepath.Join(dir, "fresh")
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	q, err := startControlPlane(ctx, fresh, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.stop(context.WithoutCancel(ctx))) }()
	return q.benchRestore(ctx, r, saved)
}

// archivedAllocs reads an archive to its end and counts its allocations.
func archivedAllocs(path string) (int, error) {
	in, err := raftstore.Inspect(path)
	if err == nil {
		err = in.Fault
	}
	if err == nil && in.Kind != raftstore.KindArchive {
		err = errors.New("is a server's own snapshot file; save an archive with: rxvision snapshot save FILE")
	}
	if err != nil {
		return 0, fmt.Errorf("--archive %s: %w", path, err)
	}
	debug.FreeOSMemory() // the servers need it
	for _, t := range in.Tables {
		if t.Name == cluster.TableAllocs && t.Records > 0 {
			return t.Records, nil
		}
	}
	return 0, fmt.Errorf("--archive %s: holds no allocations to measure", path)
}

// benchSave measures writes while an archive is saved, and for as long without: the
// worst p99 of some seconds each.
func (p *controlPlane) benchSave(ctx context.Context, c controlFlags, r *benchRun, path string) error {
	worst := func(of time.Duration) (time.Duration, error) {
		s, err := closedLoop(ctx, 8, c.each, func(ctx context.Context, client int) error {
			job := benchJob(fmt.Sprintf("bench-%d", serials.Add(1)), 1, "nowhere")
			return insist(ctx, func() error {
				return p.call(ctx, http.MethodPut, p.servers[client%len(p.servers)], "/v1/jobs", job, nil)
			})
		})
		return max(of, s.p99), err
	}
	if _, err := worst(0); err != nil { // the servers get warm
		return err
	}
	saved := make(chan error, 1)
	began := time.Now()
	var took time.Duration
	go func() {
		err := p.save(ctx, path)
		took = time.Since(began)
		saved <- err
	}()
	var during, quiet time.Duration
	windows := 0
	for done := false; !done; windows++ {
		var err error
		if during, err = worst(during); err != nil {
			return errors.Join(err, <-saved)
		}
		select {
		case err := <-saved:
			if err != nil {
				return err
			}
			done = true
		default:
		}
	}
	for range windows {
		var err error
		if quiet, err = worst(quiet); err != nil {
			return err
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	r.add(figure{Metric: "archive saved", Value: took.Seconds(), Unit: "s"})
	r.add(figure{Metric: "archive size", Value: float64(info.Size()) / (1 << 20), Unit: "MiB"})
	r.add(figure{Metric: "write p99 while it is saved, 8 clients", Value: ms(during), Unit: "ms", Peer: "without", PeerValue: ms(quiet), Target: "at most twice"})
	return nil
}

// benchRestart kills a follower and measures its way back.
func (p *controlPlane) benchRestart(ctx context.Context, r *benchRun) error {
	leader, err := p.leader(ctx)
	if err != nil {
		return err
	}
	s := p.servers[slices.IndexFunc(p.servers, func(s *benchServer) bool { return s != leader })]
	if err := p.kill(ctx, s); err != nil {
		return err
	}
	began := time.Now()
	if err := p.start(s); err != nil {
		return err
	}
	if err := p.level(ctx); err != nil {
		return err
	}
	r.add(figure{Metric: "restart of a server until it has applied all", Value: time.Since(began).Seconds(), Unit: "s"})
	return nil
}

// benchRestore measures the restore of an archive.
func (p *controlPlane) benchRestore(ctx context.Context, r *benchRun, archive string) error {
	began := time.Now()
	if err := p.restore(ctx, archive); err != nil {
		return err
	}
	if err := p.bootstrap(ctx); err != nil { // the archive's tokens are in force now
		return err
	}
	if err := p.level(ctx); err != nil {
		return err
	}
	r.add(figure{Metric: "restore into a fresh cluster until all three have it", Value: time.Since(began).Seconds(), Unit: "s", Target: "30"})
	return nil
}

// fill registers the jobs and waits until all that they ask for runs.
func (p *controlPlane) fill(ctx context.Context, c controlFlags, out io.Writer) error {
	const clients = 16
	next := make(chan int)
	failed := make(chan error, clients)
	done := make(chan struct{})
	fillCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range clients {
		go func() {
			for k := range next {
				job := benchJob(fmt.Sprintf("fill-%d", k), c.perJob, "dc1")
				err := insist(fillCtx, func() error {
					return p.call(fillCtx, http.MethodPut, p.servers[i%len(p.servers)], "/v1/jobs", job, nil)
				})
				if err != nil {
					failed <- err
					cancel()
					return
				}
			}
			done <- struct{}{}
		}()
	}
	for k := range c.jobs {
		select {
		case next <- k:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
		if k%500 == 0 {
			fmt.Fprintf(out, "\r%d of %d jobs registered   ", k, c.jobs)
		}
	}
	close(next)
	for range clients {
		select {
		case <-done:
		case err := <-failed:
			return err
		}
	}
	fmt.Fprintln(out)
	for k := range c.jobs { // in order: the first wait is the long one
		for {
			var summary struct {
				Summary map[string]struct{ Running int }
			}
			if err := p.call(ctx, http.MethodGet, p.servers[k%len(p.servers)], fmt.Sprintf("/v1/job/fill-%d/summary?stale", k), "", &summary); err != nil {
				return err
			}
			if summary.Summary["g"].Running == c.perJob {
				break
			}
			if err := pause(ctx); err != nil {
				return err
			}
		}
		if k%500 == 0 {
			fmt.Fprintf(out, "\r%d of %d jobs run   ", k, c.jobs)
		}
	}
	fmt.Fprintln(out)
	return nil
}

// metrics reads a server's figures without labels.
func (p *controlPlane) metrics(ctx context.Context, s *benchServer) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+s.http+"/v1/metrics?format=prometheus", nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Nomad-Token", p.token)
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if name, value, ok := strings.Cut(lines.Text(), " "); ok && !strings.HasPrefix(name, "#") {
			if v, err := strconv.ParseFloat(value, 64); err == nil {
				out[name] = v
			}
		}
	}
	return out, lines.Err()
}

// save writes an archive of the state to a file.
func (p *controlPlane) save(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.servers[0].http+"/v1/operator/snapshot", nil)
	if err != nil {
		return err
	}
	req.Header.Set("X-Nomad-Token", p.token)
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err == nil {
		err = f.Sync() // else what follows pays for it
	}
	return errors.Join(err, f.Close())
}

func (p *controlPlane) restore(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://"+p.servers[0].http+"/v1/operator/snapshot", f)
	if err != nil {
		return err
	}
	req.Header.Set("X-Nomad-Token", p.token)
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, answer)
	}
	return err
}

// level waits until every server has applied the same.
func (p *controlPlane) level(ctx context.Context) error {
	for {
		indexes := map[string]bool{}
		for _, s := range p.servers {
			var self struct {
				Stats struct {
					Raft struct {
						AppliedIndex string `json:"applied_index"`
					} `json:"raft"`
				} `json:"stats"`
			}
			if p.call(ctx, http.MethodGet, s, "/v1/agent/self", "", &self) != nil {
				indexes[s.name] = true
				continue
			}
			indexes[self.Stats.Raft.AppliedIndex] = true
		}
		if len(indexes) == 1 {
			return nil
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// benchCalm keeps three servers under full load and counts changes of leader, of
// which there should be none.
func benchCalm(ctx context.Context, c controlFlags, r *benchRun, dir string) (err error) {
	p, err := startControlPlane(ctx, dir, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	detach, err := p.attach(ctx, c.nodes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach()) }()
	term := func() (uint64, error) {
		var self struct {
			Stats struct{ Raft struct{ Term string } }
		}
		if err := p.call(ctx, http.MethodGet, p.servers[0], "/v1/agent/self", "", &self); err != nil {
			return 0, err
		}
		return strconv.ParseUint(self.Stats.Raft.Term, 10, 64)
	}
	before, err := term()
	if err != nil {
		return err
	}
	// Jobs come and go, so that the state stays the size it has.
	s, err := closedLoop(ctx, 32, c.calm, func(ctx context.Context, client int) error {
		id := fmt.Sprintf("calm-%d", serials.Add(1))
		server := p.servers[client%len(p.servers)]
		for _, w := range []struct{ method, path, body string }{
			{http.MethodPut, "/v1/jobs", benchJob(id, 1, "dc1")}, {http.MethodDelete, "/v1/job/" + id + "?purge=true", ""},
		} {
			if err := insist(ctx, func() error { return p.call(ctx, w.method, server, w.path, w.body, nil) }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := term()
	if err != nil {
		return err
	}
	r.add(figure{Metric: fmt.Sprintf("changes of leader in %s of full load, %d agents", c.calm, c.nodes), Value: float64(after - before), Unit: "", Target: "0"})
	r.add(figure{Metric: "jobs registered and purged per second meanwhile", Value: s.perSecond, Unit: "1/s"})
	return nil
}
