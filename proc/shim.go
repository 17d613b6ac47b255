package proc

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Hidden first arguments of the binary, and the descriptors that its two helper roles inherit.
const (
	argShim  = "__rx-shim"
	argStage = "__rx-stage"

	fdConfig   = 3 // JSON until end of file; cut short means the starter died, so nothing is started
	fdReport   = 4 // shim: one report; stage: an error text, or nothing and end of file on exec
	fdIdentity = 5 // shim: the locked identity file; see Find
	fdLifeline = 6 // shim, only with DieWithParent: end of file means that the starter is gone
)

const (
	selfExe   = "/proc/self/exe" // this very binary, also after its file was replaced by an upgrade
	reapLimit = 10 * time.Second // for killed processes to vanish; one stuck in the kernel must not hold the status back
	drainTime = 5 * time.Second  // for logs to reach their end after the tree is gone
	copyChunk = 32 << 10
)

var hooked atomic.Bool

// Main must be the first call in main and in TestMain of every program that uses Start. Ordinarily it only notes that it
// was called; in a process that Start launched as a supervisor it does that work and exits.
func Main() {
	hooked.Store(true)
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case argShim:
		os.Exit(shimMain())
	case argStage:
		stageMain()
	}
}

type shimConfig struct {
	Spec   Spec        `json:"spec"`
	Cred   *credential `json:"cred"`
	Staged bool        `json:"staged"`
}

// report is the supervisor's first and only word to its starter.
type report struct {
	Identity Identity `json:"identity"`
	Error    string   `json:"error"`
}

func shimMain() int {
	runtime.LockOSThread() // the command must die with this process: its parent-death signal follows the thread that forked it
	unix.CloseOnExec(fdConfig)
	unix.CloseOnExec(fdReport)
	unix.CloseOnExec(fdIdentity)
	var cfg shimConfig
	if err := readConfig(&cfg); err != nil {
		fmt.Fprintln(os.Stderr, "this mode is for the program's own use:", err)
		return 2
	}
	if cfg.Spec.DieWithParent {
		unix.CloseOnExec(fdLifeline)
	}
	out := os.NewFile(fdReport, "report")
	s := &shim{spec: cfg.Spec, pidfd: -1}
	id, err := s.launch(cfg)
	rep := report{Identity: id}
	if err != nil {
		rep.Error = err.Error()
	}
	_ = json.NewEncoder(out).Encode(rep) // fails if the starter died meanwhile; the command runs, so carry on
	out.Close()
	if err != nil {
		return 1
	}
	s.spec.Env, s.spec.Args = nil, nil
	debug.FreeOSMemory()
	return s.supervise()
}

func readConfig(v any) error {
	f := os.NewFile(fdConfig, "config")
	if f == nil {
		return errors.New("no configuration")
	}
	defer f.Close()
	return json.NewDecoder(f).Decode(v)
}

// shim is the supervisor of one command.
type shim struct {
	spec    Spec
	pid     int // of the command, in this process's pid namespace
	pidfd   int
	started time.Time
	logs    sync.WaitGroup
}

// launch starts the command and everything that watches it.
func (s *shim) launch(cfg shimConfig) (Identity, error) {
	if !cfg.Spec.LeaveOrphans {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return Identity{}, fmt.Errorf("become reaper: %w", err)
		}
	}
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)

	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return Identity{}, fmt.Errorf("open /dev/null: %w", err)
	}
	defer unix.Close(null)
	stdout, err := s.openLog(cfg.Spec.Stdout, null)
	if err != nil {
		return Identity{}, err
	}
	stderr := stdout
	if cfg.Spec.Stderr != cfg.Spec.Stdout {
		if stderr, err = s.openLog(cfg.Spec.Stderr, null); err != nil {
			return Identity{}, err
		}
		defer unix.Close(stderr)
	}
	defer unix.Close(stdout)

	attr := &syscall.ProcAttr{
		Dir: cfg.Spec.Dir, Env: cfg.Spec.Env, Files: []uintptr{uintptr(null), uintptr(stdout), uintptr(stderr)},
		Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, PidFD: &s.pidfd},
	}
	if cfg.Spec.Cgroup != "" {
		fd, err := unix.Open(filepath.Join(cfg.Spec.Cgroup, leafTask), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return Identity{}, fmt.Errorf("open cgroup: %w", err)
		}
		defer unix.Close(fd)
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
	}
	s.started = time.Now()
	if cfg.Staged {
		s.pid, err = s.forkStage(cfg, attr)
	} else {
		s.pid, err = syscall.ForkExec(cfg.Spec.Path, append([]string{cfg.Spec.Path}, cfg.Spec.Args...), attr)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("start %s: %w", cfg.Spec.Path, err)
	}
	id, err := s.identify()
	if err == nil {
		err = id.keep(fdIdentity)
	}
	if err != nil {
		_ = unix.PidfdSendSignal(s.pidfd, unix.SIGKILL, nil, 0)
		return Identity{}, err
	}
	go s.forward(sigs)
	if cfg.Spec.DieWithParent {
		go s.dieWithParent()
	}
	return id, nil
}

// identify names this tree. The pids come from /proc, because ours may be of another pid namespace.
func (s *shim) identify() (Identity, error) {
	id := Identity{StatusFile: s.spec.StatusFile, Cgroup: s.spec.Cgroup}
	self, err := os.Readlink("/proc/self")
	if err == nil {
		id.PID, err = strconv.Atoi(self)
	}
	if err == nil {
		id.TaskPID, err = hostPID(s.pidfd)
	}
	if err == nil {
		id.BootID, err = bootID()
	}
	if err != nil {
		return id, fmt.Errorf("identify process: %w", err)
	}
	shim, err := readStat(id.PID)
	if err != nil {
		return id, err
	}
	task, err := readStat(id.TaskPID) // not reaped yet, so it is there even if it ended
	id.StartTime, id.TaskStart = shim.start, task.start
	return id, err
}

// hostPID is the number of a pidfd's process as the mounted /proc counts.
func hostPID(pidfd int) (int, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(pidfd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, errors.New("the kernel does not tell the pid of a pidfd")
}

// openLog starts copying a new pipe into the log series and returns its writing end; null when there is no log.
func (s *shim) openLog(l LogFiles, null int) (int, error) {
	if l.Name == "" {
		return unix.FcntlInt(uintptr(null), unix.F_DUPFD_CLOEXEC, 0)
	}
	r, err := openRotator(l)
	if err != nil {
		return -1, err
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return -1, fmt.Errorf("log pipe: %w", err)
	}
	if err := unix.SetNonblock(p[0], true); err != nil { // only our end: the command expects a blocking one
		return -1, fmt.Errorf("log pipe: %w", err)
	}
	in := os.NewFile(uintptr(p[0]), l.Name)
	s.logs.Go(func() {
		defer r.Close()
		defer in.Close()
		buf := make([]byte, copyChunk)
		for {
			n, err := in.Read(buf)
			_, _ = r.Write(buf[:n]) // a full disk costs output; it must not stop the command
			if err != nil {
				return
			}
		}
	})
	return p[1], nil
}

// forward passes signals on that somebody sent to the supervisor instead of the command.
func (s *shim) forward(sigs <-chan os.Signal) {
	for sig := range sigs {
		if n, ok := sig.(syscall.Signal); ok {
			_ = unix.PidfdSendSignal(s.pidfd, n, nil, 0) // it may have ended
		}
	}
}

func (s *shim) dieWithParent() {
	f := os.NewFile(fdLifeline, "lifeline")
	_, _ = f.Read(make([]byte, 1)) // nothing is ever written: this returns at end of file
	_ = unix.PidfdSendSignal(s.pidfd, unix.SIGKILL, nil, 0)
}

// supervise waits for the command, clears away what it leaves behind, and writes down how it ended.
func (s *shim) supervise() int {
	ws := s.reap()
	status := ExitStatus{Code: ws.ExitStatus(), Started: s.started, Finished: time.Now()}
	if ws.Signaled() {
		status.Signal = int(ws.Signal())
		status.Code = 128 + status.Signal
	}
	if s.spec.Cgroup != "" {
		n, err := keyed(filepath.Join(s.spec.Cgroup, leafTask, "memory.events"), "oom_kill")
		status.OOMKilled = err == nil && n > 0
	}
	within(reapLimit, s.killRest)
	within(drainTime, s.logs.Wait)
	if err := status.write(s.spec.StatusFile); err != nil {
		return 1 // whoever waits finds no status and says so
	}
	return 0
}

func within(limit time.Duration, f func()) {
	done := make(chan struct{})
	go func() { f(); close(done) }()
	select {
	case <-done:
	case <-time.After(limit):
	}
}

// reap collects every child, orphans of the command included, until the command itself has ended.
func (s *shim) reap() syscall.WaitStatus {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		if pid == s.pid {
			return ws
		}
		if err != nil && err != syscall.EINTR {
			return ws // no child at all cannot happen before the command is reaped
		}
	}
}

// killRest ends whatever the command left running. As reaper of the tree this process becomes the parent of all of it, so
// the tree is gone when there is no child left.
func (s *shim) killRest() {
	if s.spec.LeaveOrphans {
		return
	}
	for {
		if s.spec.Cgroup != "" {
			_ = killCgroup(filepath.Join(s.spec.Cgroup, leafTask)) // absent before Linux 5.14; the walk below does it too
		}
		if os.Getpid() == 1 {
			_ = unix.Kill(-1, unix.SIGKILL) // everything in this pid namespace but ourselves
		} else {
			killTree(os.Getpid())
		}
		if _, err := syscall.Wait4(-1, nil, 0, nil); err != nil && err != syscall.EINTR {
			return
		}
	}
}

// killTree sends SIGKILL to every descendant of root.
func killTree(root int) {
	below, _ := descendants(root) // without /proc there is nothing to find them by
	for _, st := range below {
		_ = unix.Kill(st.pid, unix.SIGKILL)
	}
}
