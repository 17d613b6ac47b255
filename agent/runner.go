package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

// Client descriptions as Nomad words them.
const (
	describePending  = "No tasks have started"
	describeRunning  = "Tasks are running"
	describeComplete = "All tasks have completed"
	describeFailed   = "Failed tasks"
)

// runner lives one allocation: it starts the tasks, keeps them to their restart
// policies, watches their health, and ends them. What it learns goes to the disk
// first and then to the servers.
type runner struct {
	a   *Agent
	id  string
	log *slog.Logger
	dir task.AllocDir

	mu    sync.Mutex
	alloc *cluster.Allocation // as the servers sent it; replaced, never changed
	job   *cluster.Job        // the version that alloc names
	local *localState
	tasks map[string]*taskRunner
	ended bool

	changed  chan struct{} // a state changed: judge again (capacity 1)
	stop     chan struct{} // closed when the allocation shall end
	stopOnce sync.Once
	done     chan struct{} // closed when all tasks have ended, or the agent let go of them
	begun    bool          // its tasks may hold what it was given; of Agent.mu
	wg       sync.WaitGroup
	checks   checks
}

// newRunner prepares to run an allocation; local is what an earlier agent knew.
func (a *Agent) newRunner(alloc *cluster.Allocation, job *cluster.Job, local *localState) *runner {
	r := &runner{
		a: a, id: alloc.ID, dir: task.AllocDir(filepath.Join(a.allocRoot, alloc.ID)),
		log:   a.log.With("alloc", alloc.ID, "job", alloc.JobID),
		alloc: alloc, job: job, local: local, tasks: map[string]*taskRunner{},
		changed: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	if r.local == nil {
		r.local = &localState{ClientStatus: cluster.AllocClientPending, ClientDescription: describePending}
	}
	if r.local.Tasks == nil {
		r.local.Tasks = map[string]*localTask{}
	}
	g := r.group()
	if g == nil {
		return r
	}
	for _, t := range g.Tasks {
		if l := r.local.Tasks[t.Name]; l != nil && (l.Run != nil || l.State.State == cluster.TaskStateRunning) {
			r.begun = true
		}
		if r.local.Tasks[t.Name] == nil {
			state := &cluster.TaskState{State: cluster.TaskStatePending}
			addEvent(state, event(eventReceived, "Task received by client"))
			r.local.Tasks[t.Name] = &localTask{State: state}
		}
		r.tasks[t.Name] = newTaskRunner(r, t.Name)
	}
	return r
}

// group is the task group in the job version of the allocation; nil when unknown.
func (r *runner) group() *cluster.TaskGroup {
	if r.job == nil {
		return nil
	}
	return r.job.Group(r.alloc.TaskGroup)
}

// spec returns what the runner runs now, for one task.
func (r *runner) spec(name string) (*cluster.Allocation, *cluster.Job, *cluster.TaskGroup, *cluster.Task) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.group()
	return r.alloc, r.job, g, g.Task(name)
}

// run lives the allocation until its tasks have ended or ctx does. In the latter
// case the tasks run on.
func (r *runner) run(ctx context.Context) {
	defer close(r.done)
	if !r.terminal() && !r.await(ctx) || !r.begin() {
		return
	}
	for _, t := range r.tasks {
		r.wg.Go(func() { t.run(ctx) })
	}
	ended := make(chan struct{})
	r.wg.Go(func() {
		for _, t := range r.tasks {
			<-t.done
		}
		close(ended)
	})
	defer r.wg.Wait()
	stop := r.stop
	poll := time.NewTicker(checkpointEvery)
	defer poll.Stop()
	asking, stopAsking := context.WithCancel(ctx)
	defer r.checks.wg.Wait()
	defer stopAsking()
	for {
		r.syncChecks(asking)
		var timer, limit <-chan time.Time
		if wait := r.judge(time.Now()); wait > 0 {
			timer = time.After(wait)
		}
		if left := r.watchLimit(time.Now()); left > 0 {
			limit = time.After(left)
		}
		select {
		case <-r.changed:
		case <-timer:
		case <-limit:
		case <-poll.C:
			for _, t := range r.tasks {
				if t.running() != nil {
					t.takeCheckpoint()
				}
			}
		case <-stop:
			stop = nil
			r.wg.Go(func() { r.end(ctx) })
		case <-ended:
			if r.allDead() {
				r.judge(time.Now())
				var status string
				r.update(func() { r.ended, status = true, r.local.ClientStatus })
				r.log.Info("allocation ended", "status", status)
			}
			return
		}
	}
}

// begin makes the allocation's directories; false when there is nothing to run.
func (r *runner) begin() bool {
	if r.terminal() {
		r.mu.Lock()
		r.ended = true
		r.mu.Unlock()
		r.publish()
		return false
	}
	if len(r.tasks) == 0 {
		r.fail("the servers sent no job version with this task group")
		return false
	}
	if err := r.dir.Build(); err != nil {
		r.fail("failed to build allocation directory: " + err.Error())
		return false
	}
	r.update(func() {})
	return true
}

// fail ends an allocation of which no task was started.
func (r *runner) fail(text string) {
	r.update(func() {
		for _, t := range r.local.Tasks {
			t.State.State, t.State.Failed, t.State.FinishedAt = cluster.TaskStateDead, true, cluster.TimeOf(time.Now())
			addEvent(t.State, messageEvent(eventSetupFailure, text))
		}
		r.local.ClientStatus, r.local.ClientDescription = cluster.AllocClientFailed, text
		r.ended = true
	})
}

func (r *runner) terminal() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch r.local.ClientStatus {
	case cluster.AllocClientComplete, cluster.AllocClientFailed, cluster.AllocClientLost:
		return true
	}
	return false
}

// update changes the local state, stores it and tells the servers.
func (r *runner) update(change func()) {
	r.mu.Lock()
	change()
	r.settle()
	err := r.a.store.saveLocal(r.id, r.local)
	r.mu.Unlock()
	if err != nil {
		r.log.Error("the state of an allocation could not be stored; it is lost if the agent ends", "error", err)
	}
	r.publish()
	r.look()
}

// look has the runner look at its tasks again.
func (r *runner) look() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// settle derives the client status from the tasks'. Unlike Nomad it says complete
// or failed only once every task has ended, because from then on the servers give
// the resources to others.
func (r *runner) settle() {
	var pending, running, failed bool
	for _, t := range r.local.Tasks {
		switch t.State.State {
		case cluster.TaskStatePending:
			pending = true
		case cluster.TaskStateRunning:
			running = true
		default:
			failed = failed || t.State.Failed
		}
	}
	l := r.local
	switch {
	case len(l.Tasks) == 0:
	case running:
		l.ClientStatus, l.ClientDescription = cluster.AllocClientRunning, describeRunning
	case pending:
		l.ClientStatus, l.ClientDescription = cluster.AllocClientPending, describePending
	case failed:
		l.ClientStatus, l.ClientDescription = cluster.AllocClientFailed, describeFailed
		if g := r.group(); l.Overrun && g != nil {
			l.ClientDescription = limitReached(g.MaxRunDuration)
		}
	default:
		l.ClientStatus, l.ClientDescription = cluster.AllocClientComplete, describeComplete
	}
}

// publish hands the client's side of the allocation to the stream.
func (r *runner) publish() {
	r.mu.Lock()
	a := &cluster.Allocation{
		ID: r.id, Namespace: r.alloc.Namespace, JobID: r.alloc.JobID, NodeID: r.alloc.NodeID, Epoch: r.alloc.Epoch,
		ClientStatus: r.local.ClientStatus, ClientDescription: r.local.ClientDescription,
		TaskStates: make(map[string]*cluster.TaskState, len(r.local.Tasks)), Checkpoints: r.checkpoints(),
	}
	for name, t := range r.local.Tasks {
		s := *t.State
		s.Events = slices.Clone(s.Events) // events themselves are never changed
		a.TaskStates[name] = &s
	}
	if l := r.local; l.Healthy != nil && l.Deployment == r.alloc.DeploymentID {
		a.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: l.Healthy, Timestamp: l.HealthTime}
	}
	if !a.ClientTerminal() {
		a.Serving = r.serving()
	}
	r.mu.Unlock()
	r.a.updates.put(a)
}

// judge looks at the tasks as a whole: what a task's end means for the others, and
// health. It says after how long to look again without a change, 0: not.
func (r *runner) judge(now time.Time) time.Duration {
	for _, v := range r.victims() {
		v.task.requestKill(v.reason)
	}
	r.letBegin()
	return r.watchHealth(now)
}

type victim struct {
	task   *taskRunner
	reason *cluster.TaskEvent
}

// victims are the tasks to end because of another's end: one that failed takes
// all along, a leader's end too; sidecars end with the last of those that they are for.
// Poststop tasks are none: they run because of such ends.
func (r *runner) victims() (out []victim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.group()
	if g == nil || r.local.Overrun { // then they are ended in their order
		return nil
	}
	var reason *cluster.TaskEvent
	for _, name := range slices.Sorted(maps.Keys(r.local.Tasks)) {
		s := r.local.Tasks[name].State
		spec := g.Task(name)
		switch {
		case s.State != cluster.TaskStateDead:
		case s.Failed:
			reason = event(eventSiblingFailed, "Task's sibling \""+name+"\" failed", "failed_sibling", name)
		case spec != nil && spec.Leader && reason == nil:
			reason = event(eventLeaderDead, "Leader Task in Group dead")
		}
	}
	if reason == nil && r.onlySidecars(g) {
		reason = event(eventMainDead, "Main tasks in the group died")
	}
	if reason == nil {
		return nil
	}
	for name, t := range r.tasks {
		if spec := g.Task(name); spec == nil || spec.Lifecycle.Is(cluster.HookPoststop) {
			continue
		}
		if l := r.local.Tasks[name]; l.State.State != cluster.TaskStateDead && !l.Stopping {
			out = append(out, victim{t, reason})
		}
	}
	return out
}

// allDead says whether every task has ended for good.
func (r *runner) allDead() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.local.Tasks {
		if t.State.State != cluster.TaskStateDead {
			return false
		}
	}
	return true
}

// requestStop makes the allocation end. It returns at once.
func (r *runner) requestStop() { r.stopOnce.Do(func() { close(r.stop) }) }

// end ends the tasks: no more requests are routed to it, a notice is given if it was
// preempted, the group's shutdown delay passes, then the leader ends, then the others,
// sidecars last.
func (r *runner) end(ctx context.Context) {
	r.mu.Lock()
	var delay time.Duration
	g := r.group()
	if g.ShutdownDelay != nil && !r.noDelay() {
		delay = *g.ShutdownDelay
	}
	r.mu.Unlock()
	for _, t := range r.tasks {
		t.setServing(nil)
	}
	if r.giveNotice(ctx); ctx.Err() != nil {
		return
	}
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
	}
	for step := range endSteps {
		for name, t := range r.tasks {
			if spec := g.Task(name); spec != nil && endOrder(spec) == step {
				t.requestKill(nil)
			}
		}
		for name, t := range r.tasks {
			if spec := g.Task(name); spec != nil && endOrder(spec) == step {
				<-t.done
			}
		}
	}
}

// noDelay says whether shutdown delays are waived. Caller holds mu.
func (r *runner) noDelay() bool {
	skip := r.alloc.DesiredTransition.NoShutdownDelay
	return r.local.Gone || skip != nil && *skip
}

// replace takes what the servers want now. Epochs never go back.
func (r *runner) replace(alloc *cluster.Allocation, job *cluster.Job) {
	r.mu.Lock()
	if alloc.Epoch < r.alloc.Epoch {
		r.mu.Unlock()
		return
	}
	moved := alloc.ClientStatus != r.local.ClientStatus || alloc.Epoch != r.alloc.Epoch || alloc.DeploymentID != r.alloc.DeploymentID
	r.alloc = alloc
	if job != nil && job.Group(alloc.TaskGroup) != nil {
		r.job = job
	}
	moved = moved || !alloc.Terminal() && r.knownLess()
	r.mu.Unlock()
	r.look()
	if alloc.ServerTerminal() {
		r.requestStop()
	}
	if moved { // also when the servers know less than was acknowledged: they were restored
		r.update(func() {})
	}
}

// knownLess says whether the servers lack where the model is to be had, or the
// verdict on the allocation's health. Caller holds mu.
func (r *runner) knownLess() bool {
	said, here := r.alloc.Serving, r.serving()
	if here != nil && (said == nil || *said != *here) {
		return true
	}
	ds, l := r.alloc.DeploymentStatus, r.local
	return l.Healthy != nil && l.Deployment == r.alloc.DeploymentID && (ds == nil || ds.Healthy == nil || *ds.Healthy != *l.Healthy)
}

// serving is where the allocation's model is to be had: that of its first task
// that serves one. Caller holds mu.
func (r *runner) serving() *cluster.Serving {
	if g := r.group(); g != nil {
		for _, t := range g.Tasks {
			if l := r.local.Tasks[t.Name]; t.Model != nil && l != nil {
				return l.Serving
			}
		}
	}
	return nil
}

// isDone says whether the allocation has ended on this node.
func (r *runner) isDone() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ended
}

// finished gives when the last task ended.
func (r *runner) finished() (at cluster.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.local.Tasks {
		at = max(at, t.State.FinishedAt)
	}
	return at
}

// collect removes the directories of an allocation that has ended.
func (r *runner) collect() error {
	err := errors.Join(os.RemoveAll(string(r.dir)), os.RemoveAll(r.a.statusDir(r.id)))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.local.Collected = true
	if !r.local.Gone {
		err = errors.Join(err, r.a.store.saveLocal(r.id, r.local))
	}
	return err
}
