package agent

import (
	"context"

	"github.com/rxvision/rxvision/cluster"
)

// Tasks with a lifecycle block run around the main tasks of their group (Nomad:
// lifecycle): what is to have run before them has ended well, and the sidecars have
// started, when the main tasks start; what follows them starts when all of them have;
// when nothing runs any more but sidecars these end; and at the very end, however all
// that went, the poststop tasks run. Whose turn it is follows from the tasks' states
// alone, so that an agent that takes over goes on where the last one was.

// letBegin opens the way to each task whose turn has come. What has begun is held up no
// more: restarts go by the restart policy.
func (r *runner) letBegin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.group()
	if g == nil {
		return
	}
	for name, t := range r.tasks {
		if spec := g.Task(name); spec != nil && r.hasTurn(g, spec.Lifecycle) {
			t.turnOnce.Do(func() { close(t.turn) })
		}
	}
}

// hasTurn says whether a task with that block may start now. Caller holds mu.
func (r *runner) hasTurn(g *cluster.TaskGroup, l *cluster.TaskLifecycle) bool {
	for _, t := range g.Tasks {
		other := r.local.Tasks[t.Name]
		if other == nil {
			continue
		}
		s, ready := other.State, true
		switch {
		case l.Is(cluster.HookPrestart):
		case l == nil && t.Lifecycle.Is(cluster.HookPrestart) && t.Lifecycle.Once():
			ready = s.State == cluster.TaskStateDead && !s.Failed
		case l == nil && t.Lifecycle.Is(cluster.HookPrestart), l.Is(cluster.HookPoststart) && t.Lifecycle == nil:
			ready = s.State != cluster.TaskStatePending
		case l.Is(cluster.HookPoststop) && !t.Lifecycle.Is(cluster.HookPoststop):
			ready = s.State == cluster.TaskStateDead
		}
		if !ready {
			return false
		}
	}
	return true
}

// onlySidecars says whether sidecars are all that lives, poststop tasks aside. Caller
// holds mu.
func (r *runner) onlySidecars(g *cluster.TaskGroup) bool {
	sidecars := false
	for _, t := range g.Tasks {
		l := r.local.Tasks[t.Name]
		switch {
		case l == nil || l.State.State == cluster.TaskStateDead || t.Lifecycle.Is(cluster.HookPoststop):
		case t.Lifecycle == nil || t.Lifecycle.Once():
			return false
		default:
			sidecars = true
		}
	}
	return sidecars
}

// awaitTurn waits until the task may start, or is to end; false when the agent ends.
func (t *taskRunner) awaitTurn(ctx context.Context) bool {
	select {
	case <-t.turn:
	case <-t.kill.Done():
	case <-t.r.a.suspend.Done():
		return false
	case <-ctx.Done():
		return false
	}
	return true
}

// restartsAs is the job type by which a task's restarts go: what runs once is done when
// it has ended well, and a sidecar is not, whatever the job.
func restartsAs(jobType string, l *cluster.TaskLifecycle) string {
	switch {
	case l == nil:
		return jobType
	case l.Once():
		return cluster.JobTypeBatch
	}
	return cluster.JobTypeService
}

// endOrder says in which of endSteps a task is ended: the leader first, then the other
// main tasks, then what runs around them. Poststop tasks (-1) are not ended with the
// others: they begin then.
func endOrder(t *cluster.Task) int {
	switch {
	case t.Lifecycle.Is(cluster.HookPoststop):
		return -1
	case t.Lifecycle != nil:
		return 2
	case t.Leader:
		return 0
	}
	return 1
}

const endSteps = 3
