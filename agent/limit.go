package agent

import (
	"fmt"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// countFrom notes that a task has begun to run: the run time limit counts from the first start of a main
// task, whatever is started again later, by whichever agent. Caller holds mu.
func (r *runner) countFrom(task string, at cluster.Time) {
	g := r.group()
	if g == nil || r.local.Began != 0 {
		return
	}
	if t := g.Task(task); t != nil && t.Lifecycle == nil {
		r.local.Began = at
	}
}

// watchLimit ends the allocation once it has run for as long as its group allows, as if it were told to
// stop; but it has failed then. It says how long it may still run, 0 for no limit.
func (r *runner) watchLimit(now time.Time) time.Duration {
	r.mu.Lock()
	g, began, over := r.group(), r.local.Began, r.local.Overrun
	r.mu.Unlock()
	switch {
	case over: // perhaps an earlier agent saw it
		r.requestStop()
		return 0
	case g == nil || g.MaxRunDuration <= 0 || began == 0:
		return 0
	}
	if left := began.Add(g.MaxRunDuration).Std().Sub(now); left > 0 {
		return left
	}
	select {
	case <-r.stop: // it ends anyway
		return 0
	default:
	}
	text := limitReached(g.MaxRunDuration)
	r.log.Info("allocation has reached its run time limit", "limit", g.MaxRunDuration)
	r.update(func() {
		r.local.Overrun = true
		for name, t := range r.local.Tasks {
			if spec := g.Task(name); t.State.State != cluster.TaskStateDead && spec != nil && spec.Lifecycle == nil {
				addEvent(t.State, messageEvent(cluster.EventRunLimit, text))
			}
		}
	})
	r.requestStop()
	return 0
}

func limitReached(limit time.Duration) string {
	return fmt.Sprintf("Run time limit of %s reached", limit)
}
