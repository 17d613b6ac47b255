package task

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rxvision/rxvision/proc"
)

// process is the Handle of every driver that runs a process tree.
type process struct {
	state   State
	p       *proc.Process // nil: it had ended when it was recovered
	done    chan struct{}
	quit    chan struct{} // closed when nobody watches any more: ended, or let go
	exit    Exit
	cleanup func() // run once when the task has ended or is let go

	cancel context.CancelFunc
	wg     sync.WaitGroup
	detach sync.Once
}

// startProcess starts spec and keeps its state before and after.
func startProcess(spec proc.Spec, s State, keep func(State) error, cleanup func()) (*process, error) {
	s.Identity = proc.Identity{StatusFile: spec.StatusFile, Cgroup: spec.Cgroup}
	if err := keep(s); err != nil {
		return nil, transient{fmt.Errorf("keep the task's state: %w", err)}
	}
	p, err := proc.Start(spec)
	if err != nil {
		return nil, err
	}
	s.Identity = p.Identity()
	if err := keep(s); err != nil {
		_, stopErr := p.Stop(context.Background(), syscall.SIGKILL, 0)
		p.Detach()
		return nil, transient{errors.Join(fmt.Errorf("keep the task's state: %w", err), stopErr)}
	}
	return watchProcess(p, s, cleanup), nil
}

func watchProcess(p *proc.Process, s State, cleanup func()) *process {
	ctx, cancel := context.WithCancel(context.Background())
	h := &process{state: s, p: p, done: make(chan struct{}), quit: make(chan struct{}), cleanup: cleanup, cancel: cancel}
	h.wg.Go(func() {
		defer close(h.quit)
		exit, err := p.Wait(ctx)
		if h.cleanup != nil {
			h.cleanup()
		}
		if ctx.Err() != nil && err != nil || errors.Is(err, proc.ErrDetached) {
			return
		}
		h.exit = exit // an error beside a status is about a cgroup that stays, which hurts nobody
		close(h.done)
	})
	return h
}

// endedProcess is the Handle of a task that ended while nobody looked.
func endedProcess(s State, exit Exit) *process {
	h := &process{state: s, done: make(chan struct{}), exit: exit, cancel: func() {}}
	close(h.done)
	return h
}

// recoverProcess takes over what s names. Only a process that still runs calls
// cleanup, at its end.
func recoverProcess(s State, cleanup func()) (*process, error) {
	if s.Identity.PID == 0 {
		id, err := findStarted(s, time.Now().Add(findLimit))
		if err != nil {
			return nil, err
		}
		s.Identity = id
	}
	p, err := proc.Attach(s.Identity)
	switch {
	case err == nil:
		return watchProcess(p, s, cleanup), nil
	case !errors.Is(err, proc.ErrGone):
		return nil, err
	}
	exit, err := proc.Collect(s.Identity)
	if exit == (Exit{}) && err != nil {
		return nil, err
	}
	return endedProcess(s, exit), nil
}

func (h *process) State() State          { return h.state }
func (h *process) Done() <-chan struct{} { return h.done }
func (h *process) Exit() Exit            { return h.exit }

func (h *process) Signal(sig syscall.Signal) error {
	if h.p == nil {
		return os.ErrProcessDone
	}
	return h.p.Signal(sig)
}

func (h *process) Stop(ctx context.Context, sig syscall.Signal, grace time.Duration) error {
	if h.p == nil {
		return nil
	}
	if _, err := h.p.Stop(ctx, sig, grace); err != nil {
		select {
		case <-h.p.Done(): // ended; the error is about clearing up
		default:
			return err
		}
	}
	<-h.quit
	select {
	case <-h.done:
		return nil
	default:
		return proc.ErrDetached
	}
}

func (h *process) Usage() (Usage, error) {
	if h.p == nil {
		return Usage{}, os.ErrProcessDone
	}
	return h.p.Usage()
}

func (h *process) Detach() {
	h.detach.Do(func() {
		h.cancel()
		h.wg.Wait()
		if h.p != nil {
			h.p.Detach()
		}
	})
}

// How long, and how often, findStarted waits for supervisors that are coming up.
const (
	findLimit = 5 * time.Second
	findPoll  = 20 * time.Millisecond
)

// findStarted looks for the process of a start that was cut short: an agent that
// was killed after the start, before it could keep the identity. The supervisor
// runs on by then. It is found as the parent of the one process whose environment
// names the task.
func findStarted(s State, limit time.Time) (proc.Identity, error) {
	id, pending := s.Identity, false
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		id.BootID = strings.TrimSpace(string(b))
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return id, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if isSupervisor(pid) && childless(pid) {
			pending = true
		}
		if !isTask(pid, s) {
			continue
		}
		parent, start, ok := procTimes(pid)
		if !ok {
			continue
		}
		_, parentStart, ok := procTimes(parent)
		if !ok || !isSupervisor(parent) || (id.TaskPID != 0 && start >= id.TaskStart) {
			continue // the command itself is the oldest child of its supervisor
		}
		id.PID, id.StartTime, id.TaskPID, id.TaskStart = parent, parentStart, pid, start
	}
	if id.PID != 0 {
		return id, nil
	}
	if pending && time.Now().Before(limit) { // a supervisor is about to start something: it may be this
		time.Sleep(findPoll)
		return findStarted(s, limit)
	}
	if _, err := os.Stat(id.StatusFile); err == nil { // it ran, and ended
		id.PID, id.TaskPID = -1, -1
		return id, nil
	}
	if id.Cgroup != "" { // whatever is left in there has lost its supervisor
		id.PID, id.TaskPID = -1, -1
		if _, err := proc.Collect(id); err != nil {
			return id, fmt.Errorf("clear up an unfinished start: %w", err)
		}
	}
	return id, ErrNotStarted
}

// childless reports whether a process has no child yet, or has none any more.
func childless(pid int) bool {
	threads, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*", "children"))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, path := range threads {
		if b, err := os.ReadFile(path); err != nil || len(bytes.TrimSpace(b)) > 0 {
			return false
		}
	}
	return true
}

// isTask reports whether the process has the task's environment.
func isTask(pid int, s State) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return false
	}
	var alloc, task bool
	for kv := range bytes.SplitSeq(b, []byte{0}) {
		alloc = alloc || string(kv) == "NOMAD_ALLOC_ID="+s.AllocID
		task = task || string(kv) == "NOMAD_TASK_NAME="+s.Task
	}
	return alloc && task
}

// isSupervisor reports whether the process is a supervisor of package proc.
func isSupervisor(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	args := bytes.Split(b, []byte{0})
	return err == nil && len(args) > 1 && bytes.HasPrefix(args[1], []byte("__rx-shim"))
}

// procTimes reads the parent and the start time (ticks after boot) of a process.
func procTimes(pid int) (ppid int, start uint64, ok bool) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	end := bytes.LastIndexByte(b, ')')
	if err != nil || end < 0 {
		return 0, 0, false
	}
	f := strings.Fields(string(b[end+1:])) // f[0] is field 3 of proc_pid_stat(5)
	if len(f) < 20 {
		return 0, 0, false
	}
	ppid, err1 := strconv.Atoi(f[1])
	start, err2 := strconv.ParseUint(f[19], 10, 64)
	return ppid, start, errors.Join(err1, err2) == nil
}
