package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

// DefaultKillTimeout is between the kill signal and SIGKILL for a task that names
// no kill_timeout; MaxKillTimeout bounds what a task may name.
const (
	DefaultKillTimeout = 5 * time.Second
	MaxKillTimeout     = 10 * time.Minute
)

// routeWait bounds the wait for the servers to know that a model is not to be had
// any more, before its server is told to end: requests go elsewhere by then.
const routeWait = time.Second

// taskRunner lives one task of an allocation. Its local state belongs to the
// runner and is guarded by runner.mu.
type taskRunner struct {
	r    *runner
	name string
	log  *slog.Logger

	mu     sync.Mutex
	handle task.Handle // of the run that is on, nil between runs
	stats  usageSample

	checkpoint fs.FileInfo // of the file that tells of checkpoints, as it was read last

	turnOnce sync.Once
	kill     context.Context // ends when the task shall end
	killNow  context.CancelFunc
	restart  chan string   // a reason to restart now, outside the policy (capacity 1)
	unwell   chan string   // a reason why the run counts as failed (capacity 1)
	turn     chan struct{} // closed when the tasks that are to run before have
	done     chan struct{} // closed when the task has ended for good, or the agent let go of it
}

func newTaskRunner(r *runner, name string) *taskRunner {
	t := &taskRunner{
		r: r, name: name, log: r.log.With("task", name),
		restart: make(chan string, 1), unwell: make(chan string, 1), turn: make(chan struct{}), done: make(chan struct{}),
	}
	t.kill, t.killNow = context.WithCancel(context.Background())
	return t
}

// local is the task's stored state; hold r.mu.
func (t *taskRunner) local() *localTask { return t.r.local.Tasks[t.name] }

// update changes the task's state, stores and publishes it.
func (t *taskRunner) update(change func(l *localTask)) {
	t.r.update(func() { change(t.local()) })
}

func (t *taskRunner) event(e *cluster.TaskEvent) {
	t.update(func(l *localTask) { addEvent(l.State, e) })
}

// requestKill makes the task end; reason is the event that says why, or nil. It
// returns at once.
func (t *taskRunner) requestKill(reason *cluster.TaskEvent) {
	t.update(func(l *localTask) {
		if reason != nil && !l.Stopping && l.State.State != cluster.TaskStateDead {
			addEvent(l.State, reason)
		}
		l.Stopping = true
	})
	t.killNow()
}

// ending is how a run came to its end.
type ending int

const (
	letGo     ending = iota // the agent ends; the task runs on
	exited                  // by itself, or it never began
	killed                  // it was to end
	restarted               // somebody asked for a restart
	unwell                  // a check failed too often
	suspended               // the agent ends and takes its tasks along, to start them again
	lost                    // while no agent ran, by no fault of its own: a reboot
)

// reasonLost is why a task that was lost starts again outside its policy.
const reasonLost = "Task was lost while no agent ran"

// run lives the task until it has ended for good or ctx ends.
func (t *taskRunner) run(ctx context.Context) {
	defer close(t.done)
	defer t.killNow()
	h, over := t.recover(ctx)
	for recovered := h != nil; !over; recovered = false {
		end, how := exited, succeeded
		if h == nil && !t.awaitTurn(ctx) {
			return // the next agent waits on
		}
		if h == nil && t.kill.Err() == nil {
			if h, how = t.start(ctx); h == nil && (ctx.Err() != nil || t.r.a.suspend.Err() != nil) {
				return // the next agent starts it
			}
		}
		var last *cluster.TaskEvent
		if h != nil {
			if end = t.watch(ctx, h); end == letGo {
				return
			}
			exit := h.Exit()
			if !exit.Success() || end == unwell {
				how = broke
			}
			if exit.Lost && recovered && end == exited {
				end = lost
			}
			last = t.terminated(exit)
		}
		v := t.conclude(end, how, last)
		if h != nil {
			removeQuietly(h.State().Identity.StatusFile)
			h = nil
		}
		over = end == suspended || !v.restart || !t.pause(ctx, v.delay)
	}
}

// terminated describes the end of a run. A Go program that crashes in C exits with
// 2 like any that fails, so a worker's own last words are looked at.
func (t *taskRunner) terminated(exit task.Exit) *cluster.TaskEvent {
	if _, _, _, spec := t.r.spec(t.name); spec.Driver != task.DriverONNX {
		return terminatedEvent("task", exit, "")
	}
	crash := ""
	if exit.Code == goCrash && exit.Signal == 0 {
		crash = crashReason(t.r.dir.Logs(), t.name+".stderr")
	}
	return terminatedEvent("worker", exit, crash)
}

// conclude records the end of a run, last, and what follows it, in one step, so
// that an agent that dies here neither forgets the end nor judges it twice.
func (t *taskRunner) conclude(end ending, how outcome, last *cluster.TaskEvent) (v verdict) {
	_, job, group, spec := t.r.spec(t.name)
	policy := spec.RestartPolicy
	if policy == nil {
		policy = group.RestartPolicy
	}
	t.takeCheckpoint() // with the end the servers hear the last
	t.r.mu.Lock()
	noticed, overrun := t.r.local.Noticed != 0, t.r.local.Overrun
	t.r.mu.Unlock()
	if t.kill.Err() != nil || noticed || overrun && how != succeeded {
		end = killed
	}
	if end == suspended {
		t.update(func(l *localTask) {
			l.Run, l.State.State = nil, cluster.TaskStatePending
			addEvent(l.State, last)
		})
		return v
	}
	now, random := time.Now(), rand.Float64()
	t.update(func(l *localTask) {
		s := l.State
		l.Run = nil
		if last != nil {
			addEvent(s, last)
		}
		switch end {
		case killed:
			addEvent(s, event(eventKilled, "Task successfully killed"))
			v.failed = overrun && spec.Lifecycle == nil
		case restarted:
			v = verdict{restart: true}
		case lost:
			v = verdict{restart: true, reason: reasonLost}
		default:
			v = decide(policy, restartsAs(job.Type, spec.Lifecycle), how, l, now, random)
		}
		if v.restart {
			s.State, s.LastRestart = cluster.TaskStatePending, cluster.TimeOf(now)
			s.Restarts++
			addEvent(s, restartingEvent(v))
			return
		}
		s.State, s.Failed, s.FinishedAt = cluster.TaskStateDead, v.failed, cluster.TimeOf(now)
		if last != nil {
			s.FinishedAt = cluster.Time(last.Time)
		}
		if v.reason != "" {
			addEvent(s, notRestartingEvent(v))
		}
	})
	if v.restart {
		t.r.a.metrics.restarts.Inc()
	}
	return v
}

// pause waits until the next run is due, or the task shall end, or is asked to
// restart now; false when ctx ended.
func (t *taskRunner) pause(ctx context.Context, delay time.Duration) bool {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.restart:
	case <-t.kill.Done():
	case <-t.r.a.suspend.Done():
		return false
	case <-ctx.Done():
		return false
	}
	return true
}

// recover takes the run over that an earlier agent left. over: the task had ended.
func (t *taskRunner) recover(ctx context.Context) (h task.Handle, over bool) {
	t.r.mu.Lock()
	state, run := t.local().State.State, t.local().Run
	if t.local().Stopping {
		t.killNow()
	}
	t.r.mu.Unlock()
	if state == cluster.TaskStateDead {
		return nil, true
	}
	if run == nil {
		return nil, false
	}
	driver, err := t.r.a.drivers.Get(run.Driver)
	if err == nil {
		h, err = driver.Recover(ctx, *run)
	}
	switch {
	case err == nil:
		t.log.Info("task taken over", "pid", h.State().Identity.TaskPID)
		t.started(h)
		return h, false
	case errors.Is(err, task.ErrNotStarted):
		t.update(func(l *localTask) { l.Run = nil })
	default:
		t.log.Error("a task of an earlier agent could not be taken over", "error", err)
		t.update(func(l *localTask) {
			l.Run, l.Serving, l.Ready = nil, nil, 0
			addEvent(l.State, failureEvent(eventDriverFailure, "driver_error", fmt.Errorf("failed to recover task: %w", err)))
		})
	}
	return nil, false
}

// start prepares and starts a run. Without a Handle the outcome says why not; the
// events have been written.
func (t *taskRunner) start(ctx context.Context) (task.Handle, outcome) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.r.a.suspend, cancel)()
	defer context.AfterFunc(t.kill, cancel)() // a download must not hold up the end of its task
	alloc, job, _, spec := t.r.spec(t.name)
	driver, err := t.r.a.drivers.Get(spec.Driver)
	if err != nil {
		t.event(failureEvent(eventDriverFailure, "driver_error", err))
		return nil, unrecoverable
	}
	dir := t.r.dir.Task(t.name)
	t.r.mu.Lock()
	begun := *alloc
	begun.Checkpoints = t.r.checkpoints()
	t.r.mu.Unlock()
	env := task.NewEnv(t.r.a.nodeRecord(), t.r.a.cfg.Region, job, &begun, spec, dir)
	if how := t.prepare(ctx, job, spec, dir, env); how != succeeded {
		return nil, how
	}
	status := filepath.Join(t.r.a.statusDir(t.r.id), t.name+"."+newUUID()[:8])
	if err := os.MkdirAll(filepath.Dir(status), 0o700); err != nil {
		t.event(failureEvent(eventDriverFailure, "driver_error", err))
		return nil, broke
	}
	h, err := driver.Start(ctx, &task.Config{
		Alloc: alloc, Task: spec, Dir: dir, Env: env, StatusFile: status,
		Keep: func(s task.State) error {
			t.r.mu.Lock()
			defer t.r.mu.Unlock()
			t.local().Run = &s
			return t.r.a.store.saveLocal(t.r.id, t.r.local)
		},
		Notice: func(text string) { t.event(messageEvent(eventDriver, text)) },
	})
	if err != nil {
		t.log.Warn("task did not start", "error", err)
		t.update(func(l *localTask) {
			l.Run = nil
			addEvent(l.State, failureEvent(eventDriverFailure, "driver_error", err))
		})
		if task.Transient(err) {
			return nil, broke
		}
		return nil, unrecoverable
	}
	t.started(h)
	return h, succeeded
}

// prepare makes what the task finds when it starts: directories, the payload of a
// dispatch, artifacts (once) and templates (each time, since they may set variables).
func (t *taskRunner) prepare(ctx context.Context, job *cluster.Job, spec *cluster.Task, dir task.Dir, env *task.Env) outcome {
	t.r.mu.Lock()
	prepared := t.local().Prepared
	t.r.mu.Unlock()
	if !prepared {
		t.event(messageEvent(eventSetup, "Building Task Directory"))
		if err := dir.Build(task.User(spec)); err != nil {
			t.event(failureEvent(eventSetupFailure, "setup_error", fmt.Errorf("failed to build task directory: %w", err)))
			return unrecoverable
		}
		if p := spec.DispatchPayload; p != nil && len(job.Payload) > 0 {
			if err := task.WritePayload(dir, p.File, job.Payload, task.User(spec)); err != nil {
				t.event(failureEvent(eventSetupFailure, "setup_error", err))
				return unrecoverable
			}
		}
		if len(spec.Artifacts) > 0 {
			t.event(event(eventDownloading, "Client is downloading artifacts"))
		}
		for _, a := range spec.Artifacts {
			if err := t.r.a.artifacts.Get(ctx, a, dir, env); err != nil {
				t.event(failureEvent(eventDownloadFailed, "download_error", err))
				return broke
			}
		}
		t.update(func(l *localTask) { l.Prepared = true })
	}
	if err := task.RenderTemplates(spec.Templates, dir, env); err != nil {
		t.event(failureEvent(eventSetupFailure, "setup_error", err))
		return unrecoverable
	}
	return succeeded
}

// started records that a run is on.
func (t *taskRunner) started(h task.Handle) {
	t.mu.Lock()
	t.handle, t.stats = h, usageSample{}
	t.mu.Unlock()
	s := h.State()
	t.update(func(l *localTask) {
		l.Run = &s
		if l.State.State != cluster.TaskStateRunning { // else an earlier agent recorded it
			l.State.State, l.State.StartedAt = cluster.TaskStateRunning, cluster.TimeOf(time.Now())
			addEvent(l.State, event(eventStarted, "Task started by client"))
		}
		t.r.countFrom(t.name, l.State.StartedAt)
	})
	if s.TLS {
		select {
		case t.r.a.certified <- struct{}{}:
		default:
		}
	}
}

// watch waits for the end of a run, or ends it when asked to. After letGo the task
// may run on.
func (t *taskRunner) watch(ctx context.Context, h task.Handle) (end ending) {
	probes, stopProbes := context.WithCancel(ctx)
	var wg sync.WaitGroup
	if h.State().Address != "" {
		wg.Go(func() { t.probe(probes, h.State()) })
	}
	defer func() {
		stopProbes()
		wg.Wait()
		h.Detach()
	}()
	select {
	case <-t.unwell: // it was about the run before
	default:
	}
	select {
	case <-h.Done():
		end = exited
	case <-ctx.Done():
		return letGo
	case <-t.kill.Done():
		end = killed
	case <-t.r.a.suspend.Done():
		end = suspended
	case reason := <-t.restart:
		end = restarted
		t.event(event(eventRestartSignal, reason, "restart_reason", reason))
	case reason := <-t.unwell:
		end = unwell
		t.event(event(eventRestartSignal, reason, "restart_reason", reason))
	}
	stopProbes()
	wg.Wait()
	if h.State().Address != "" {
		t.setServing(nil)
		if end != exited && t.r.a.isConnected() {
			t.r.a.updates.delivered(ctx, t.r.id, routeWait)
		}
	}
	if end != exited && !t.terminate(ctx, h, end) {
		return letGo
	}
	t.log.Info("task ended", "exit", h.Exit().String())
	t.mu.Lock()
	t.handle = nil
	t.mu.Unlock()
	return end
}

// terminate ends a run: shutdown delay, kill signal, kill timeout, SIGKILL. False
// when ctx ended first.
func (t *taskRunner) terminate(ctx context.Context, h task.Handle, end ending) bool {
	_, _, _, spec := t.r.spec(t.name)
	t.r.mu.Lock()
	skip := t.r.noDelay()
	t.r.mu.Unlock()
	if spec.ShutdownDelay > 0 && end == killed && !skip {
		t.event(event(eventShutdownDelay, fmt.Sprintf("Waiting for shutdown_delay of %s before killing the task.", spec.ShutdownDelay)))
		select {
		case <-time.After(spec.ShutdownDelay):
		case <-h.Done():
			return true
		case <-ctx.Done():
			return false
		}
	}
	sig, err := task.StopSignal(spec)
	if err != nil {
		t.log.Warn("kill_signal", "error", err)
		sig = syscall.SIGTERM
	}
	grace := killGrace(spec)
	switch end {
	case killed:
		t.event(killingEvent(sig, grace, ""))
	case suspended:
		t.event(killingEvent(sig, grace, "The agent is shutting down; the task starts again with it"))
	}
	release := context.AfterFunc(ctx, h.Detach) // the next agent goes on with it
	defer release()
	for {
		err := h.Stop(context.WithoutCancel(ctx), sig, grace)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		t.log.Error("task could not be ended; trying again", "error", err)
		t.event(failureEvent(eventKilling, "kill_error", err))
		select {
		case <-time.After(time.Second):
		case <-h.Done():
		case <-ctx.Done():
			return false
		}
	}
}

// killGrace is between a task's kill signal and SIGKILL.
func killGrace(spec *cluster.Task) time.Duration {
	if spec.KillTimeout <= 0 {
		return DefaultKillTimeout
	}
	return min(spec.KillTimeout, MaxKillTimeout)
}

// running returns the handle of the run that is on, nil when none is.
func (t *taskRunner) running() task.Handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.handle
}

// requestRestart makes the task restart now; false when it has ended for good.
func (t *taskRunner) requestRestart() bool {
	select {
	case <-t.done:
		return false
	default:
	}
	if t.running() == nil {
		return false
	}
	select {
	case t.restart <- "User requested running tasks to restart":
	default: // one is under way
	}
	return true
}

// restartUnwell ends the run as one that failed: what follows is the restart policy's to say.
func (t *taskRunner) restartUnwell(reason string) {
	if t.running() == nil {
		return
	}
	select {
	case t.unwell <- reason:
	default: // one is under way
	}
}

// signal sends a signal by name to the running task.
func (t *taskRunner) signal(name string) error {
	h := t.running()
	if h == nil {
		return cluster.Errorf(cluster.CodeInternal, "Task not running")
	}
	sig, err := task.ParseSignal(name, syscall.SIGINT)
	if err != nil {
		return cluster.Errorf(cluster.CodeInvalid, "%v", err)
	}
	t.event(event(eventSignaling, "Task being sent a signal", "signal", name))
	if err := h.Signal(sig); err != nil {
		return cluster.Errorf(cluster.CodeInternal, "send %s to task %q: %v", name, t.name, err)
	}
	return nil
}
