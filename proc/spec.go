package proc

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
)

// Spec says what to start and how. The zero value of every optional field means "as the caller has it".
type Spec struct {
	Path   string   // program: a path, or a bare name that is looked up in the PATH of Env
	Args   []string // arguments, without the program's name
	Env    []string // the whole environment, "KEY=value"; nothing is added
	Dir    string   // working directory; required, absolute
	Stdout LogFiles // where standard output goes; zero: discarded
	Stderr LogFiles // where standard error goes; zero: discarded

	// StatusFile is required and absolute: the supervisor writes the ExitStatus there as JSON, and its Identity beside it
	// (".id"). No two commands that run share one.
	StatusFile string

	// LeaveOrphans lets processes that the command started live on when it ends: for a command that supervises others
	// and takes them over again after its own restart. By default they are killed.
	LeaveOrphans bool

	DieWithParent bool   // kill the tree when the starter dies or detaches; by default it lives on
	User          string // name or uid to run as; "": the caller's own, or "nobody" under Isolation

	Cgroup      string // cgroup v2 directory to create, below Capabilities.CgroupParent; "": none
	Limits      Limits // need Cgroup
	Rlimits     Rlimits
	OOMScoreAdj int // -1000..1000, 0: as inherited

	Isolation *Isolation // nil: none
	NoNetwork bool       // a network namespace of its own with nothing but loopback
}

// LogFiles is a bounded series of files Dir/Name.0, Dir/Name.1, … (the naming of Nomad's alloc/logs). A file that reaches
// MaxBytes is followed by the next index, and only the newest MaxFiles are kept. A restart continues the newest one.
type LogFiles struct {
	Dir      string
	Name     string // e.g. "web.stdout"
	MaxFiles int    // 0: DefaultLogFiles
	MaxBytes int64  // per file; 0: DefaultLogBytes
}

// Defaults of LogFiles, as in a Nomad job's logs block.
const (
	DefaultLogFiles = 10
	DefaultLogBytes = 10 << 20
)

// Limits of the whole tree, enforced by cgroup v2 (kernel Documentation/admin-guide/cgroup-v2.rst).
type Limits struct {
	MemoryBytes int64 // memory.max, swap off; above it the tree is killed as a whole and OOMKilled is set; 0: none
	CPUShares   int64 // relative weight when CPUs are contended, as in Nomad (MHz); becomes cpu.weight; 0: none
	CPUMillis   int64 // hard ceiling in thousandths of a CPU (cpu.max); 0: none
	PIDs        int64 // processes and threads (pids.max); 0: none
}

// Rlimits are per-process limits (setrlimit(2)); 0 leaves one as inherited. There is deliberately no address-space limit:
// inference runtimes reserve far more than they use.
type Rlimits struct {
	CPUSeconds uint64 // SIGXCPU at the limit, SIGKILL a second later
	FileBytes  uint64 // largest file a process may write
	OpenFiles  uint64
}

// Isolation puts the command into its own pid, mount and ipc namespaces. It needs root; Probe says whether it works here.
type Isolation struct {
	Writable []string // absolute directories or files that stay writable; Spec.Dir is among them unless it is /
	ReadOnly []string // absolute paths to keep visible although they lie below /tmp, /var/tmp or a Hidden directory
	Hidden   []string // absolute directories shown empty; Writable and ReadOnly paths below them stay visible
	Tmp      string   // directory shown as /tmp; "": an empty one in memory of at most 64 MiB
}

// errUnhooked keeps a program without the hook from starting copies of itself.
var errUnhooked = errors.New("proc: Main was not called: call proc.Main() first in main or TestMain")

func (s *Spec) validate() error {
	var errs []error
	need := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	need(s.Path != "", "no program given (Path)")
	need(filepath.IsAbs(s.Dir), "working directory %q is not absolute", s.Dir)
	need(filepath.IsAbs(s.StatusFile), "status file %q is not absolute", s.StatusFile)
	need(s.Cgroup == "" || filepath.IsAbs(s.Cgroup), "cgroup %q is not an absolute directory", s.Cgroup)
	need(s.Limits == Limits{} || s.Cgroup != "", "limits need a cgroup (Cgroup)")
	need(s.OOMScoreAdj >= -1000 && s.OOMScoreAdj <= 1000, "oom score adjustment %d is not within -1000..1000", s.OOMScoreAdj)
	need(!s.LeaveOrphans || s.Cgroup == "" && s.Isolation == nil, "orphans cannot be left in a cgroup or a pid namespace, which end as a whole")
	for _, v := range append(append([]string{s.Path}, s.Args...), s.Env...) {
		need(!strings.ContainsRune(v, 0), "argument or variable %q contains a NUL byte", v)
	}
	for _, l := range []LogFiles{s.Stdout, s.Stderr} {
		need(l.Name == "" || filepath.IsAbs(l.Dir), "log directory %q is not absolute", l.Dir)
		need(l.Name == filepath.Base(l.Name) || l.Name == "", "log name %q is not a plain file name", l.Name)
		need(l.MaxFiles >= 0 && l.MaxBytes >= 0, "log bounds of %q are negative", l.Name)
	}
	if s.Isolation != nil {
		for _, p := range s.Isolation.paths() {
			need(filepath.IsAbs(p), "isolation path %q is not absolute", p)
		}
	}
	return errors.Join(errs...)
}

func (i *Isolation) paths() []string {
	all := append(append(append([]string{}, i.Writable...), i.ReadOnly...), i.Hidden...)
	if i.Tmp != "" {
		all = append(all, i.Tmp)
	}
	return all
}

// staged reports whether something must be done between fork and exec of the command.
func (s *Spec) staged(cred *credential) bool {
	return s.Isolation != nil || s.NoNetwork || cred != nil || s.Rlimits != Rlimits{} || s.OOMScoreAdj != 0
}

// credential is what a user name resolves to.
type credential struct {
	UID    int   `json:"uid"`
	GID    int   `json:"gid"`
	Groups []int `json:"groups"`
}

// lookupUser resolves a user name or a number; a number without an entry is used as uid and gid.
func lookupUser(name string) (*credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			if id, numErr := strconv.ParseUint(name, 10, 31); numErr == nil {
				return &credential{UID: int(id), GID: int(id)}, nil
			}
			return nil, fmt.Errorf("user %q: %w", name, err)
		}
	}
	c := &credential{}
	if c.UID, err = strconv.Atoi(u.Uid); err != nil {
		return nil, fmt.Errorf("user %q has uid %q: %w", name, u.Uid, err)
	}
	if c.GID, err = strconv.Atoi(u.Gid); err != nil {
		return nil, fmt.Errorf("user %q has gid %q: %w", name, u.Gid, err)
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("groups of user %q: %w", name, err)
	}
	for _, g := range groups {
		if id, err := strconv.Atoi(g); err == nil {
			c.Groups = append(c.Groups, id)
		}
	}
	return c, nil
}

// defaultPath is searched when Env has no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// lookPath finds the program as execvp would, but with the PATH the command itself will have.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.ContainsRune(name, '/') {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	path := defaultPath
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d)
		}
		if p := filepath.Join(d, name); executable(p) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("program %q: %w in PATH %q", name, os.ErrNotExist, path)
}

func executable(path string) error {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("program: %w", err)
	case fi.IsDir() || fi.Mode()&0o111 == 0:
		return fmt.Errorf("program %s is not executable: %w", path, os.ErrPermission)
	}
	return nil
}
