package proc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// memoryTmp bounds each private file system in memory (/tmp, /var/tmp, /dev/shm) of an isolated command.
const memoryTmp = "size=64m"

// stageConfig is what happens between fork and exec, in the process that becomes the command.
type stageConfig struct {
	Spec   Spec        `json:"spec"`
	Cred   *credential `json:"cred"`
	Parent int         `json:"parent"` // the supervisor's pid as the stage sees it
}

// forkStage starts this binary once more, to prepare the process before it becomes the command.
func (s *shim) forkStage(cfg shimConfig, attr *syscall.ProcAttr) (int, error) {
	conf, err := json.Marshal(stageConfig{Spec: cfg.Spec, Cred: cfg.Cred, Parent: os.Getpid()})
	if err != nil {
		return 0, err
	}
	confR, confW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer confR.Close()
	repR, repW, err := os.Pipe()
	if err != nil {
		confW.Close()
		return 0, err
	}
	defer repR.Close()
	staged := *attr
	staged.Dir = "/"
	staged.Env = helperEnv()
	staged.Files = append(attr.Files, confR.Fd(), repW.Fd())
	if cfg.Spec.Isolation != nil {
		staged.Sys.Cloneflags |= unix.CLONE_NEWNS | unix.CLONE_NEWIPC
	}
	if cfg.Spec.NoNetwork {
		staged.Sys.Cloneflags |= unix.CLONE_NEWNET
	}
	pid, err := syscall.ForkExec(selfExe, []string{filepath.Base(os.Args[0]), argStage}, &staged)
	repW.Close()
	if err != nil {
		confW.Close()
		return 0, fmt.Errorf("prepare: %w", err)
	}
	_, err = confW.Write(conf)
	err = errors.Join(err, confW.Close())
	text, readErr := io.ReadAll(io.LimitReader(repR, 4096))
	if err := errors.Join(err, readErr); err != nil || len(text) > 0 {
		_ = unix.PidfdSendSignal(s.pidfd, unix.SIGKILL, nil, 0)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		if len(text) > 0 {
			err = errors.New(string(text))
		}
		return 0, err
	}
	return pid, nil
}

// stageMain prepares this process and becomes the command, or tells why not.
func stageMain() {
	runtime.LockOSThread() // several of the settings belong to the thread that calls execve
	unix.CloseOnExec(fdConfig)
	unix.CloseOnExec(fdReport)
	var cfg stageConfig
	err := readConfig(&cfg)
	if err == nil {
		err = cfg.become()
	}
	_, _ = os.NewFile(fdReport, "report").WriteString(err.Error())
	os.Exit(1)
}

// become does not return when it succeeds.
func (c *stageConfig) become() error {
	if c.Spec.OOMScoreAdj != 0 {
		if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(c.Spec.OOMScoreAdj)), 0); err != nil {
			return fmt.Errorf("set oom score: %w", err)
		}
	}
	if c.Spec.NoNetwork {
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("raise loopback: %w", err)
		}
	}
	if c.Spec.Isolation != nil {
		if err := c.Spec.Isolation.mount(c.Spec.Dir); err != nil {
			return fmt.Errorf("isolate: %w", err)
		}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("give up new privileges: %w", err)
		}
	}
	if err := os.Chdir(c.Spec.Dir); err != nil {
		return err
	}
	if err := c.Spec.Rlimits.set(); err != nil {
		return err
	}
	if c.Cred != nil {
		err := syscall.Setgroups(c.Cred.Groups)
		if err == nil {
			err = syscall.Setgid(c.Cred.GID)
		}
		if err == nil {
			err = syscall.Setuid(c.Cred.UID)
		}
		if err != nil {
			return fmt.Errorf("become user %d: %w", c.Cred.UID, err)
		}
	}
	// A change of user clears the parent-death signal.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("set parent death signal: %w", err)
	}
	if os.Getppid() != c.Parent {
		return errors.New("the supervisor died")
	}
	return syscall.Exec(c.Spec.Path, append([]string{c.Spec.Path}, c.Spec.Args...), c.Spec.Env)
}

func (r Rlimits) set() error {
	for _, l := range []struct {
		name      string
		resource  int
		soft, add uint64
	}{
		{"cpu seconds", unix.RLIMIT_CPU, r.CPUSeconds, 1},
		{"file bytes", unix.RLIMIT_FSIZE, r.FileBytes, 0},
		{"open files", unix.RLIMIT_NOFILE, r.OpenFiles, 0},
	} {
		if l.soft == 0 {
			continue
		}
		// syscall, not unix: it keeps the runtime from restoring the inherited number of files at exec
		if err := syscall.Setrlimit(l.resource, &syscall.Rlimit{Cur: l.soft, Max: l.soft + l.add}); err != nil {
			return fmt.Errorf("limit %s to %d: %w", l.name, l.soft, err)
		}
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// keep is a path that must stay visible whatever is mounted over its parents, held open for that time.
type keep struct {
	path     string
	fd       int
	dir      bool
	writable bool
}

// mount rearranges this process's own mount namespace. Order matters: hold what must stay, make all else read-only, cover
// what is private, put back what was held.
func (i *Isolation) mount(workDir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("detach from the host's mounts: %w", err)
	}
	var keeps []keep
	hold := func(writable bool, paths ...string) error {
		for _, p := range paths {
			k := keep{path: p, writable: writable}
			var st unix.Stat_t
			var err error
			if k.fd, err = unix.Open(p, unix.O_PATH|unix.O_CLOEXEC, 0); err == nil {
				err = unix.Fstat(k.fd, &st)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			k.dir = st.Mode&unix.S_IFMT == unix.S_IFDIR
			keeps = append(keeps, k)
		}
		return nil
	}
	if i.Tmp != "" {
		if err := hold(true, i.Tmp); err != nil {
			return err
		}
		keeps[0].path = "/tmp"
	}
	if err := errors.Join(hold(false, i.ReadOnly...), hold(true, i.Writable...)); err != nil {
		return err
	}
	if workDir != "/" {
		if err := hold(true, workDir); err != nil {
			return err
		}
	}
	slices.SortStableFunc(keeps, func(a, b keep) int { return len(a.path) - len(b.path) }) // parents before what is in them
	readOnly := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, readOnly); err != nil {
		return fmt.Errorf("make the host's files read-only: %w", err)
	}
	for _, p := range []string{"/tmp", "/var/tmp", "/dev/shm"} {
		if _, err := os.Stat(p); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := unix.Mount("tmpfs", p, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777,"+memoryTmp); err != nil {
			return fmt.Errorf("private %s: %w", p, err)
		}
	}
	var hidden []string
	for _, p := range i.Hidden {
		err := unix.Mount("tmpfs", p, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m")
		switch {
		case err == nil:
			hidden = append(hidden, p)
		case !errors.Is(err, unix.ENOENT): // absent, or already covered with /tmp
			return fmt.Errorf("hide %s: %w", p, err)
		}
	}
	for _, k := range keeps {
		if err := k.mount(); err != nil {
			return fmt.Errorf("keep %s: %w", k.path, err)
		}
	}
	for _, p := range hidden {
		if err := unix.MountSetattr(unix.AT_FDCWD, p, 0, readOnly); err != nil {
			return fmt.Errorf("hide %s: %w", p, err)
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("private /proc: %w", err)
	}
	return nil
}

// mount binds the held file or directory to its path, which may have been covered.
func (k keep) mount() error {
	defer unix.Close(k.fd)
	if _, err := os.Stat(k.path); errors.Is(err, os.ErrNotExist) {
		if err := k.makePoint(); err != nil {
			return err
		}
	}
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(k.fd), k.path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if k.writable { // mounts below it stay as they are: the host may have made them read-only for a reason
		return unix.MountSetattr(unix.AT_FDCWD, k.path, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
	}
	return unix.MountSetattr(unix.AT_FDCWD, k.path, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

func (k keep) makePoint() error {
	dir := k.path
	if !k.dir {
		dir = filepath.Dir(k.path)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil || k.dir {
		return err
	}
	return os.WriteFile(k.path, nil, 0o644)
}
