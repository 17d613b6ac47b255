package cluster

// Hooks of a task's lifecycle block as Nomad names them.
const (
	HookPrestart  = "prestart"
	HookPoststart = "poststart"
	HookPoststop  = "poststop"
)

// TaskLifecycle says when a task runs that is not one of its group's main tasks (Nomad:
// https://developer.hashicorp.com/nomad/docs/job-specification/lifecycle): before they
// start, once they have started, or after all others have ended.
type TaskLifecycle struct {
	Hook    string
	Sidecar bool // it runs on beside the main tasks, and is ended after them
}

// Once says whether a task runs to its end once; a main task (nil) does not.
func (l *TaskLifecycle) Once() bool { return l != nil && !l.Sidecar }

// Is says whether a task has the hook; a main task has none.
func (l *TaskLifecycle) Is(hook string) bool { return l != nil && l.Hook == hook }

// Overlap adds up what the tasks of an allocation need at one time: those that run once
// before the main tasks, or after them, need nothing while these run.
type Overlap struct{ before, main, after, along int64 }

// Add counts what a task needs.
func (o *Overlap) Add(l *TaskLifecycle, amount int64) {
	switch {
	case l == nil || l.Once() && l.Hook == HookPoststart:
		o.main += amount
	case l.Sidecar:
		o.along += amount
	case l.Hook == HookPrestart:
		o.before += amount
	default:
		o.after += amount
	}
}

// Most is the most that is needed at one time.
func (o *Overlap) Most() int64 { return o.along + max(o.before, o.main, o.after) }

// hasLifecycles says whether some task of the job has a lifecycle block.
func (j *Job) hasLifecycles() bool {
	for _, g := range j.TaskGroups {
		if g == nil {
			continue
		}
		for _, t := range g.Tasks {
			if t != nil && t.Lifecycle != nil {
				return true
			}
		}
	}
	return false
}
