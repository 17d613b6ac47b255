package proc

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The two children of Spec.Cgroup. Controllers may only be given to a group without processes of its own, so the
// supervisor and the command live in leaves.
const (
	leafTask = "task"
	leafShim = "shim"
)

// errNoController: the cgroup exists but cannot limit anything.
var errNoController = errors.New("cgroup controller not available")

// cgroupMount finds where the cgroup v2 hierarchy is mounted.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// proc_pid_mountinfo(5): … (4) root (5) mount point … "-" fstype source options
		left, right, ok := strings.Cut(sc.Text(), " - ")
		if l := strings.Fields(left); ok && strings.HasPrefix(right, "cgroup2 ") && len(l) > 4 {
			return unescapeMount.Replace(l[4]), nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy is mounted")
}

var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// ownCgroup is the caller's own place in the v2 hierarchy, "/" for its root.
func ownCgroup() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return p, nil
		}
	}
	return "", errors.New("the process is in no cgroup v2 group")
}

// prepareParent makes the directory below which tasks get their groups and passes the controllers down to it. The first
// error says why there can be no groups at all, the second why they cannot limit.
func prepareParent(parent string) (tree, limits error) {
	mount, err := cgroupMount()
	if err != nil {
		return err, err
	}
	rel, err := filepath.Rel(mount, parent)
	if err != nil || rel == "." || !filepath.IsLocal(rel) {
		err := fmt.Errorf("cgroup parent %s is not below %s", parent, mount)
		return err, err
	}
	own, err := ownCgroup()
	if err != nil {
		return err, err
	}
	if in := filepath.Join("/", rel) + "/"; own != "/" && strings.HasPrefix(in, own+"/") {
		err := fmt.Errorf("cgroup parent %s is inside this process's own group %s, which dies as a whole", parent, own)
		return err, err
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		err = fmt.Errorf("create cgroup parent: %w", err)
		return err, err
	}
	at := mount
	for _, step := range append([]string{"."}, strings.Split(rel, "/")...) {
		at = filepath.Join(at, step)
		if err := enableControllers(at, "memory", "cpu", "pids"); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// enableControllers gives the children of a group the controllers.
func enableControllers(dir string, names ...string) error {
	has, err := words(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	on, err := words(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	for _, n := range names {
		switch {
		case on[n]:
		case !has[n]:
			return fmt.Errorf("%w: %s has no %q controller (it may be bound to cgroup v1)", errNoController, dir, n)
		default:
			if err := writeControl(dir, "cgroup.subtree_control", "+"+n); err != nil {
				return fmt.Errorf("%w: %w", errNoController, err)
			}
		}
	}
	return nil
}

func words(path string) (map[string]bool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	set := make(map[string]bool)
	for _, w := range strings.Fields(string(b)) {
		set[w] = true
	}
	return set, nil
}

func writeControl(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("write %q: %w", value, err)
	}
	return nil
}

// createCgroup makes dir with its two leaves and sets the limits. An empty leftover of the same name is replaced.
func createCgroup(dir string, l Limits) error {
	if _, err := os.Stat(dir); err == nil {
		if populated(dir) {
			return fmt.Errorf("cgroup %s exists and has processes in it", dir)
		}
		if err := removeCgroup(dir); err != nil {
			return err
		}
	}
	for _, d := range []string{dir, filepath.Join(dir, leafTask), filepath.Join(dir, leafShim)} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return fmt.Errorf("create cgroup: %w", err)
		}
	}
	for _, c := range l.controllers() {
		if err := enableControllers(dir, c); err != nil {
			return fmt.Errorf("limits: %w", err)
		}
	}
	return l.write(filepath.Join(dir, leafTask))
}

func (l Limits) controllers() (need []string) {
	if l.MemoryBytes > 0 {
		need = append(need, "memory")
	}
	if l.CPUShares > 0 || l.CPUMillis > 0 {
		need = append(need, "cpu")
	}
	if l.PIDs > 0 {
		need = append(need, "pids")
	}
	return need
}

const cpuPeriod = 100_000 // microseconds, the kernel's default

// write sets the limits in the control files of one group.
func (l Limits) write(dir string) error {
	type setting struct {
		file, value string
		optional    bool
	}
	var set []setting
	if l.MemoryBytes > 0 {
		set = append(set,
			setting{file: "memory.max", value: strconv.FormatInt(l.MemoryBytes, 10)},
			setting{file: "memory.oom.group", value: "1"},
			setting{file: "memory.swap.max", value: "0", optional: true}) // absent where swap is not accounted
	}
	if l.CPUShares > 0 {
		set = append(set, setting{file: "cpu.weight", value: strconv.FormatInt(weight(l.CPUShares), 10)})
	}
	if l.CPUMillis > 0 {
		quota := max(l.CPUMillis*cpuPeriod/1000, 1000) // the kernel refuses less than a millisecond
		set = append(set, setting{file: "cpu.max", value: fmt.Sprintf("%d %d", quota, cpuPeriod)})
	}
	if l.PIDs > 0 {
		set = append(set, setting{file: "pids.max", value: strconv.FormatInt(l.PIDs, 10)})
	}
	for _, s := range set {
		if err := writeControl(dir, s.file, s.value); err != nil && (!s.optional || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("limits: %w", err)
		}
	}
	return nil
}

// weight maps shares (2..262144, the range of cgroup v1 that Nomad's MHz live in) linearly to cpu.weight (1..10000).
func weight(shares int64) int64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// populated reports whether any process lives in the group or below it.
func populated(dir string) bool {
	n, err := keyed(filepath.Join(dir, "cgroup.events"), "populated")
	return err == nil && n != 0
}

// keyed reads one value of a "key value" file.
func keyed(path, key string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			return strconv.ParseInt(v, 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %q", path, key)
}

// killCgroup sends SIGKILL to everything in and below the group.
func killCgroup(dir string) error {
	return writeControl(dir, "cgroup.kill", "1")
}

// emptyWait bounds the wait for killed processes to leave a group.
const (
	emptyWait = 2 * time.Second
	emptyPoll = 5 * time.Millisecond
)

// removeCgroup removes the group and those that the command made below it. Nothing to remove is no error.
func removeCgroup(dir string) error {
	for end := time.Now().Add(emptyWait); ; time.Sleep(emptyPoll) {
		err := removeGroups(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
}

// ClearCgroup kills whatever is in a Spec.Cgroup and removes it: for a start that was cut short, of which Find knows nothing.
// A group that does not exist is no error.
func ClearCgroup(dir string) error {
	_ = killCgroup(dir) // what it does not end, removal reports
	return removeCgroup(dir)
}

func removeGroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeGroups(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return unix.Rmdir(dir)
}

// cgroupPIDs lists the processes in the group and below it.
func cgroupPIDs(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		set, err := words(filepath.Join(path, "cgroup.procs"))
		for w := range set {
			if pid, err := strconv.Atoi(w); err == nil {
				pids = append(pids, pid)
			}
		}
		return err
	})
	return pids, err
}
