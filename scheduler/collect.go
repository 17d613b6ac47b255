package scheduler

import (
	"context"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// pagePause is between two pages of a collection, and at least as long as the page
// took: it never takes more than half of a core, and others' changes come between
// its own.
const pagePause = 10 * time.Millisecond

// collect forgets ended records from time to time.
func (s *Scheduler) collect(ctx context.Context) error {
	c := newCollector(&s.keep)
	for {
		if err := sleep(ctx, s.keep.JobGCInterval); err != nil {
			return err
		}
		if err := s.walk(ctx, c); err != nil && ctx.Err() == nil {
			s.log.Error("ended records could not be forgotten", "error", err)
			c = newCollector(&s.keep)
		}
	}
}

// ForceGC forgets whatever has ended, however short ago (Nomad: system gc). It may
// be called on any server, leading or not, and returns when all is done.
func (s *Scheduler) ForceGC(ctx context.Context) error {
	c := newCollector(&s.keep)
	c.forced = true
	return s.walk(ctx, c)
}

// walk lets a collector go through the whole state once.
func (s *Scheduler) walk(ctx context.Context, c *collector) error {
	for {
		start := time.Now()
		cmds, done := c.page(s.store.State().Snapshot(), now())
		for _, cmd := range cmds {
			_, err := s.apply(ctx, cmd)
			if err != nil && cluster.CodeOf(err) != cluster.CodeNotFound { // else somebody was faster; the rest is found again
				return err
			}
			if r, ok := cmd.(*cluster.Reap); ok && err == nil {
				s.metrics.reaped.Add(float64(len(r.Evals) + len(r.Allocs) + len(r.Deployments) + len(r.Jobs) + len(r.Versions) + len(r.Nodes)))
			}
			if err := sleep(ctx, max(pagePause, time.Since(start))); err != nil {
				return err
			}
			start = time.Now()
		}
		if done {
			return nil
		}
		if err := sleep(ctx, max(pagePause, time.Since(start))); err != nil {
			return err
		}
	}
}
