package jobspec

import (
	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// lifecycle checks when a task runs (Nomad: lifecycle block).
func (c *checker) lifecycle(in *api.Task, path string) *cluster.TaskLifecycle {
	if in.Lifecycle == nil {
		return nil
	}
	l := &cluster.TaskLifecycle{Hook: in.Lifecycle.Hook, Sidecar: in.Lifecycle.Sidecar}
	at := join(path, "lifecycle")
	c.oneOf(l.Hook, join(at, "hook"), cluster.HookPrestart, cluster.HookPoststart, cluster.HookPoststop)
	if l.Sidecar && l.Hook == cluster.HookPoststop {
		c.fault(join(at, "sidecar"), "a task that runs after all others cannot run beside them")
	}
	if in.Leader {
		c.fault(join(path, "leader"), "a task with a lifecycle block cannot be the leader")
	}
	return l
}

// mainTask wants a task that the others can be before, beside and after.
func (c *checker) mainTask(tasks []*cluster.Task, path string) {
	for _, t := range tasks {
		if t.Lifecycle == nil {
			return
		}
	}
	if len(tasks) > 0 {
		c.fault(path, "all tasks have a lifecycle block; a group has a main task at least, which has none")
	}
}
