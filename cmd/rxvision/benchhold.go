package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// holdIdle is how long a region is watched while nothing is asked of it.
const holdIdle = 10 * time.Second

// hold fills a region of one server with array jobs and measures what it takes to hold them: memory, processor time while
// nothing happens, registrations beside them, an archive, a restart and a restore.
func (c *schedFlags) hold(ctx context.Context, r *benchRun, dir string) (err error) {
	p, err := startControlPlane(ctx, dir, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop(context.WithoutCancel(ctx))) }()
	empty, err := p.metrics(ctx, p.servers[0])
	if err != nil {
		return err
	}
	arrived := &arrivals{sent: map[string]time.Time{}}
	detach, err := p.enlist(ctx, c.holdNodes, arrived.take)
	if err != nil {
		return err
	}
	detach = sync.OnceValue(detach)
	defer func() { err = errors.Join(err, detach()) }()
	s := &schedRun{schedFlags: c, p: p, r: r, arrivals: arrived, name: fmt.Sprintf("%d nodes, %d allocations", c.holdNodes, c.holdAllocs)}
	if err := s.costs(ctx, "filling", s.fill); err != nil {
		return err
	}
	if err := s.held(ctx, empty); err != nil {
		return err
	}
	if err := s.beside(ctx); err != nil {
		return err
	}
	saved := filepath.Join(dir, "state.snap")
	began := time.Now()
	if err := p.save(ctx, saved); err != nil {
		return err
	}
	info, err := os.Stat(saved)
	if err != nil {
		return err
	}
	s.figure("archive saved", time.Since(began).Seconds(), "s")
	s.figure("archive", float64(info.Size())/(1<<20), "MiB")
	if err := detach(); err != nil {
		return err
	}
	began = time.Now()
	if err := errors.Join(p.kill(ctx, p.servers[0]), p.start(p.servers[0])); err != nil {
		return err
	}
	if _, err := p.leader(ctx); err != nil {
		return err
	}
	s.figure("kill -9 of the server until it leads again", time.Since(began).Seconds(), "s")
	return s.restored(ctx, dir, saved)
}

// restored loads the archive into a fresh server.
func (s *schedRun) restored(ctx context.Context, dir, saved string) (err error) {
	if err := s.p.stop(ctx); err != nil {
		return err
	}
	fresh := filepath.Join(dir, "fresh")
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	q, err := startControlPlane(ctx, fresh, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.stop(context.WithoutCancel(ctx))) }()
	began := time.Now()
	if err := q.restore(ctx, saved); err != nil {
		return err
	}
	s.figure("archive restored into a fresh server", time.Since(began).Seconds(), "s")
	return nil
}

func (s *schedRun) figure(what string, value float64, unit string) {
	s.r.add(figure{Metric: s.name + ": " + what, Value: value, Unit: unit})
}

// fill registers the jobs, one after the other, and waits until all that they ask for runs.
func (s *schedRun) fill(ctx context.Context) error {
	s.begin()
	began := time.Now()
	var ids []string
	for left := s.holdAllocs; left > 0; left -= s.allocs {
		id := fmt.Sprintf("hold-%d", serials.Add(1))
		ids = append(ids, id)
		s.send(id)
		if err := s.p.call(ctx, http.MethodPut, s.p.servers[0], "/v1/jobs", benchWork(cluster.JobTypeBatch, id, min(left, s.allocs), "dc1"), nil); err != nil {
			return err
		}
	}
	if err := s.wait(ctx, "filling", s.holdAllocs); err != nil {
		return err
	}
	s.figure("placed per second", float64(s.holdAllocs)/s.last.Sub(began).Seconds(), "1/s")
	for running := 0; running < s.holdAllocs; {
		running = 0
		for _, id := range ids {
			var summary struct {
				Summary map[string]struct{ Running int }
			}
			if err := s.p.call(ctx, http.MethodGet, s.p.servers[0], "/v1/job/"+id+"/summary?stale", "", &summary); err != nil {
				return err
			}
			running += summary.Summary["g"].Running
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("%d of %d allocations run: %w", running, s.holdAllocs, err)
		}
	}
	s.figure("all run after", time.Since(began).Seconds(), "s")
	return nil
}

// held reads what the server takes while nothing is asked of it.
func (s *schedRun) held(ctx context.Context, empty map[string]float64) error {
	before, err := s.p.spent(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-time.After(holdIdle):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := s.p.spent(ctx)
	if err != nil {
		return err
	}
	s.figure("processor time with nothing to do but heartbeats", 100*(after[0]-before[0]).Seconds()/time.Since(began).Seconds(), "% of a core")
	m, err := s.p.metrics(ctx, s.p.servers[0])
	if err != nil {
		return err
	}
	s.figure("live heap per allocation, all nodes and sessions counted in", (m["go_gc_heap_live_bytes"]-empty["go_gc_heap_live_bytes"])/float64(s.holdAllocs), "B")
	s.figure("resident memory", m["process_resident_memory_bytes"]/(1<<20), "MiB")
	return nil
}

// beside registers jobs of one allocation, one client after its answer, beside what is held.
func (s *schedRun) beside(ctx context.Context) error {
	s.begin()
	var watch sync.WaitGroup
	jobs := 0
	answered, err := closedLoop(ctx, 1, s.each, func(ctx context.Context, _ int) error {
		jobs++
		return s.register(ctx, jobs, &watch)
	})
	if err == nil {
		err = s.wait(ctx, "beside", jobs)
	}
	watch.Wait()
	if err != nil {
		return err
	}
	s.figure("a registration beside it, p50", ms(answered.p50), "ms")
	s.figure("a registration beside it, p99", ms(answered.p99), "ms")
	s.quantiles("jobs beside it", "")
	return nil
}
