package proc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	startLimit = 30 * time.Second                      // for the supervisor to report that the command runs
	killLimit  = reapLimit + drainTime + 5*time.Second // for the supervisor to report after SIGKILL, before it is killed too
)

// Process is a running tree: one supervisor and the command under it. Its methods may be called from any goroutine.
type Process struct {
	id       Identity
	shim     *os.File // pidfd
	task     *os.File // pidfd; nil when the command had already ended at Attach
	lifeline *os.File // only with DieWithParent

	done    chan struct{} // closed when status is known
	status  ExitStatus
	err     error         // from clearing up
	stopped chan struct{} // closed when the watching goroutine has ended
	detach  sync.Once
}

// helperEnv is the environment of the supervisor and the stage: one runnable thread and a small heap. The command gets
// Spec.Env, which has nothing to do with it.
func helperEnv() []string {
	env := []string{"GOMAXPROCS=1", "GOGC=25", "GORACE=atexit_sleep_ms=0"} // the last: a race build else lingers for a second
	if v, ok := os.LookupEnv("LD_LIBRARY_PATH"); ok {                      // the binary itself may need it to load
		env = append(env, "LD_LIBRARY_PATH="+v)
	}
	return env
}

// Start starts the command. When it returns without an error the command has been executed; a program that cannot be
// executed, a limit that cannot be set, an isolation that the system refuses are errors here, and then nothing is left.
func Start(spec Spec) (*Process, error) {
	if !hooked.Load() {
		return nil, errUnhooked
	}
	if err := spec.validate(); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Path, err)
	}
	p, err := start(spec)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Path, err)
	}
	return p, nil
}

func start(spec Spec) (_ *Process, err error) {
	cfg := shimConfig{Spec: spec}
	if cfg.Spec.Env == nil {
		cfg.Spec.Env = []string{} // nil would mean "inherit"
	}
	if cfg.Spec.Path, err = lookPath(spec.Path, spec.Dir, spec.Env); err != nil {
		return nil, err
	}
	if spec.Isolation != nil || spec.NoNetwork {
		if os.Geteuid() != 0 {
			return nil, errors.New("isolation needs root")
		}
	}
	name := spec.User
	if name == "" && spec.Isolation != nil {
		name = "nobody"
	}
	if name != "" {
		if cfg.Cred, err = lookupUser(name); err != nil {
			return nil, err
		}
	}
	cfg.Staged = cfg.Spec.staged(cfg.Cred)
	identity, err := claim(spec.StatusFile)
	if err != nil {
		return nil, err
	}
	defer identity.Close() // the supervisor has it open too, and with it the lock
	if err := os.Remove(spec.StatusFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("status of an earlier run: %w", err)
	}
	if spec.Cgroup != "" {
		defer func() {
			if err != nil && !populated(spec.Cgroup) {
				_ = removeCgroup(spec.Cgroup) // the error that led here matters more
			}
		}()
		if err := createCgroup(spec.Cgroup, spec.Limits); err != nil {
			return nil, err
		}
	}
	p := &Process{done: make(chan struct{}), stopped: make(chan struct{})}
	if err := p.startShim(cfg, identity); err != nil {
		return nil, err
	}
	go p.watch()
	return p, nil
}

// startShim launches the supervisor, hands it the configuration and waits for its report.
func (p *Process) startShim(cfg shimConfig, identity *os.File) (err error) {
	conf, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	pipe := func() (r, w *os.File) {
		if err == nil {
			if r, w, err = os.Pipe(); err == nil {
				open = append(open, r, w)
			}
		}
		return r, w
	}
	confR, confW := pipe()
	repR, repW := pipe()
	null, nullErr := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err := errors.Join(err, nullErr); err != nil {
		return err
	}
	open = append(open, null)
	files := []*os.File{null, null, null, confR, repW, identity}
	if cfg.Spec.DieWithParent {
		var r *os.File
		if r, p.lifeline, err = os.Pipe(); err != nil {
			return err
		}
		open = append(open, r)
		files = append(files, r)
		defer func() {
			if err != nil {
				p.lifeline.Close()
			}
		}()
	}
	attr := &os.ProcAttr{Dir: "/", Env: helperEnv(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true}}
	if cfg.Spec.Isolation != nil {
		attr.Sys.Cloneflags = unix.CLONE_NEWPID // the supervisor is its init: if it dies, the kernel ends all within
	}
	if cfg.Spec.Cgroup != "" {
		dir, err := os.Open(filepath.Join(cfg.Spec.Cgroup, leafShim))
		if err != nil {
			return fmt.Errorf("open cgroup: %w", err)
		}
		defer dir.Close()
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(dir.Fd())
	}
	child, err := os.StartProcess(selfExe, []string{filepath.Base(os.Args[0]), argShim, filepath.Base(cfg.Spec.Path)}, attr)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	confR.Close()
	repW.Close()
	defer func() {
		if err != nil {
			_ = child.Kill()
			_, _ = child.Wait()
		}
	}()

	var rep report
	_, err = confW.Write(conf)
	err = errors.Join(err, confW.Close(), repR.SetReadDeadline(time.Now().Add(startLimit)))
	if err == nil {
		if err = json.NewDecoder(repR).Decode(&rep); err == nil && rep.Error != "" {
			return errors.New(rep.Error)
		}
	}
	if err != nil {
		return fmt.Errorf("supervisor did not come up: %w", err)
	}
	p.id = rep.Identity
	if p.shim, err = openPID(p.id.PID, p.id.StartTime, false); err != nil {
		return err
	}
	p.openTask()
	return child.Release() // from here on the pidfd is the handle, as it is after Attach
}

// openPID returns a pidfd of the process, or ErrGone if the pid now belongs to another one or (unless zombies count) ended.
func openPID(pid int, start uint64, running bool) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	// The start time is read after the pidfd was opened: if it fits, the pidfd is of that process.
	if st, err := readStat(pid); err != nil || st.start != start || (running && !st.alive()) {
		unix.Close(fd)
		return nil, ErrGone
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd %d", pid)), nil
}

func (p *Process) openTask() {
	// The command may have ended already; then there is nothing to signal and the supervisor is about to report.
	p.task, _ = openPID(p.id.TaskPID, p.id.TaskStart, true)
}

// Attach finds a tree again that some earlier process started. It answers ErrGone when the supervisor runs no more, also if
// its pid was given to another process or the machine was rebooted; Collect then says how it ended.
func Attach(id Identity) (*Process, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if id.BootID != boot {
		return nil, fmt.Errorf("attach to %d: the machine was rebooted: %w", id.PID, ErrGone)
	}
	p := &Process{id: id, done: make(chan struct{}), stopped: make(chan struct{})}
	if p.shim, err = openPID(id.PID, id.StartTime, true); err != nil {
		return nil, fmt.Errorf("attach to %d: %w", id.PID, err)
	}
	p.openTask()
	go p.watch()
	return p, nil
}

// Collect reads how a tree ended for which Attach answered ErrGone, ends what its killed supervisor may have left running,
// and removes its cgroup. The error tells what could not be cleared up or read; the status is valid beside it.
func Collect(id Identity) (ExitStatus, error) {
	boot, err := bootID()
	if err != nil {
		return ExitStatus{}, err
	}
	if id.BootID != boot {
		return readStatus(id.StatusFile)
	}
	if f, err := openPID(id.PID, id.StartTime, true); err == nil {
		f.Close()
		return ExitStatus{}, fmt.Errorf("collect %d: it still runs", id.PID)
	}
	return id.finish()
}

// finish is called once the supervisor is gone.
func (id Identity) finish() (ExitStatus, error) {
	status, err := readStatus(id.StatusFile)
	if status.Lost {
		id.killLeftovers()
	}
	if id.Cgroup != "" {
		err = errors.Join(err, ClearCgroup(id.Cgroup))
	}
	return status, err
}

// killLeftovers ends the processes of the command's session after its supervisor was killed. The kernel has killed the
// command itself; its children are found by session, whose number cannot be reused while any of them lives.
func (id Identity) killLeftovers() {
	if st, err := readStat(id.TaskPID); err == nil && st.start != id.TaskStart {
		return // the number belongs to a stranger, so the session is empty
	}
	all, _ := allStats()
	for _, st := range all {
		if st.session == id.TaskPID && st.start >= id.TaskStart {
			_ = unix.Kill(st.pid, unix.SIGKILL)
		}
	}
}

// watch waits for the supervisor to end, without a thread of its own: a pidfd becomes readable then.
func (p *Process) watch() {
	defer close(p.stopped)
	conn, err := p.shim.SyscallConn()
	if err != nil {
		return
	}
	err = conn.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, _ := unix.Poll(poll, 0); n == 0 {
			return false
		}
		_ = unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED|unix.WNOHANG, nil) // reaps it if it is our child
		return true
	})
	if err != nil {
		return // detached
	}
	p.status, p.err = p.id.finish()
	close(p.done)
}

// Identity is what to keep for Attach.
func (p *Process) Identity() Identity { return p.id }

// Done is closed when the tree has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the tree to end. The error is ctx's, ErrDetached, or what could not be cleared up (a cgroup that stays);
// in the last case the status is valid.
func (p *Process) Wait(ctx context.Context) (ExitStatus, error) {
	select {
	case <-p.done:
		return p.status, p.err
	case <-ctx.Done():
		return ExitStatus{}, ctx.Err()
	case <-p.stopped:
	}
	select { // both may be ready
	case <-p.done:
		return p.status, p.err
	default:
		return ExitStatus{}, ErrDetached
	}
}

// Signal sends a signal to the command (not to its children). It returns os.ErrProcessDone when the command has ended.
func (p *Process) Signal(sig syscall.Signal) error {
	select {
	case <-p.done: // a killed command may still be a zombie, which takes signals
		return os.ErrProcessDone
	default:
		return signalFD(p.task, sig)
	}
}

func signalFD(pidfd *os.File, sig syscall.Signal) error {
	if pidfd == nil {
		return os.ErrProcessDone
	}
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := conn.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(sent, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return sent
}

// Kill ends the whole tree at once. The supervisor stays to report.
func (p *Process) Kill() error {
	if p.id.Cgroup != "" {
		_ = killCgroup(filepath.Join(p.id.Cgroup, leafTask)) // the supervisor ends what this does not
	}
	if err := p.Signal(unix.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Stop asks the command to end with sig, waits for the grace period (cut short when ctx ends), then kills the tree. It
// returns when the tree has ended, and an error only if it cannot be ended or cleared up.
func (p *Process) Stop(ctx context.Context, sig syscall.Signal, grace time.Duration) (ExitStatus, error) {
	if err := p.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return ExitStatus{}, fmt.Errorf("signal %v to %d: %w", sig, p.id.TaskPID, err)
	}
	soft, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if st, err := p.Wait(soft); soft.Err() == nil || !errors.Is(err, soft.Err()) {
		return st, err
	}
	if err := p.Kill(); err != nil {
		return ExitStatus{}, fmt.Errorf("kill %d: %w", p.id.TaskPID, err)
	}
	hard, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	if st, err := p.Wait(hard); hard.Err() == nil || !errors.Is(err, hard.Err()) {
		return st, err
	}
	// The supervisor itself is stuck (stopped by somebody, say).
	if p.id.Cgroup != "" {
		_ = killCgroup(p.id.Cgroup)
	}
	killTree(p.id.PID)
	if err := signalFD(p.shim, unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return ExitStatus{}, fmt.Errorf("kill supervisor %d: %w", p.id.PID, err)
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	return p.Wait(last)
}

// Detach lets go of the tree, which runs on (with DieWithParent: which is killed). Wait then returns ErrDetached. It waits for the
// goroutine that Start or Attach started, and must be called for every Process, ended or not; further calls do nothing.
func (p *Process) Detach() {
	p.detach.Do(func() {
		p.shim.Close()
		<-p.stopped
		if p.task != nil {
			p.task.Close()
		}
		if p.lifeline != nil {
			p.lifeline.Close()
		}
	})
}

// Usage is what a tree uses, its supervisor not counted.
type Usage struct {
	CPU       time.Duration // user and system time, ended processes of the tree included
	RSS       int64         // resident bytes; pages shared within the tree count once per process
	Processes int
}

// Usage measures the tree: from its cgroup when it has one, otherwise by walking /proc.
func (p *Process) Usage() (Usage, error) {
	select {
	case <-p.done:
		return Usage{}, os.ErrProcessDone
	default:
	}
	if p.id.Cgroup != "" {
		return cgroupUsage(filepath.Join(p.id.Cgroup, leafTask))
	}
	below, err := descendants(p.id.PID)
	if err != nil {
		return Usage{}, fmt.Errorf("usage of %d: %w", p.id.PID, err)
	}
	shim, err := readStat(p.id.PID)
	if err != nil || shim.start != p.id.StartTime {
		return Usage{}, os.ErrProcessDone
	}
	u := Usage{CPU: shim.reaped}
	for _, st := range below {
		u.add(st)
		u.CPU += st.cpu + st.reaped
	}
	return u, nil
}

func (u *Usage) add(st procStat) {
	if st.alive() {
		u.RSS += st.rss
		u.Processes++
	}
}

func cgroupUsage(dir string) (Usage, error) {
	micros, err := keyed(filepath.Join(dir, "cpu.stat"), "usage_usec")
	if err != nil {
		return Usage{}, fmt.Errorf("usage: %w", err)
	}
	pids, err := cgroupPIDs(dir)
	if err != nil {
		return Usage{}, fmt.Errorf("usage: %w", err)
	}
	u := Usage{CPU: time.Duration(micros) * time.Microsecond}
	for _, pid := range pids {
		if st, err := readStat(pid); err == nil {
			u.add(st)
		}
	}
	return u, nil
}
