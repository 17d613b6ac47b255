package agent

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

// giveNotice tells the tasks of an allocation that was preempted, by a signal, and waits until
// they have ended or the group's grace is over. What has been told does not restart, and is
// told once: an agent that takes over waits for the rest of the time.
func (r *runner) giveNotice(ctx context.Context) {
	r.mu.Lock()
	g := r.group()
	if !r.preempted() || g == nil {
		r.mu.Unlock()
		return
	}
	grace, name := g.PreemptGrace(), ""
	if g.Preempt != nil {
		name = g.Preempt.Signal
	}
	before := r.local.Noticed
	r.mu.Unlock()
	if before == 0 {
		r.log.Info("allocation is preempted", "grace", grace)
		r.update(func() {
			before = cluster.TimeOf(time.Now())
			r.local.Noticed = before
			for _, t := range r.local.Tasks {
				if t.State.State != cluster.TaskStateDead {
					addEvent(t.State, messageEvent(eventSignaling, fmt.Sprintf("Task is preempted: it may save its work for %s", grace)))
				}
			}
		})
		for _, t := range r.tasks {
			t.notice(name)
		}
	}
	timer := time.NewTimer(time.Until(before.Add(grace).Std()))
	defer timer.Stop()
	for _, t := range r.tasks {
		select {
		case <-t.done:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// preempted says whether the allocation makes room for another. Caller holds mu.
func (r *runner) preempted() bool { return r.alloc.DesiredStatus == cluster.AllocDesiredEvict }

// notice sends a running task the signal of that name; one between two runs just ends.
func (t *taskRunner) notice(name string) {
	h := t.running()
	if h == nil {
		t.requestKill(nil)
		return
	}
	sig, err := task.ParseSignal(name, syscall.SIGTERM)
	if err == nil {
		err = h.Signal(sig)
	}
	if err != nil {
		t.event(failureEvent(eventSignaling, "signal_error", fmt.Errorf("notice of preemption: %w", err)))
	}
}
