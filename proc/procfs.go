package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// tick is the unit of the times in /proc/PID/stat: USER_HZ, which is 100 on every Linux port that Go has.
const tick = 10 * time.Millisecond

// procStat is what we read of /proc/PID/stat (proc_pid_stat(5)).
type procStat struct {
	pid, ppid, session int
	state              byte
	start              uint64        // ticks since boot
	cpu                time.Duration // user and system, own
	reaped             time.Duration // the same of children already waited for
	rss                int64         // bytes
}

var errBadStat = errors.New("unexpected format")

func readStat(pid int) (procStat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, err
	}
	st, err := parseStat(b)
	if err != nil {
		return procStat{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
	}
	return st, nil
}

// parseStat reads one stat line. The second field is a name that may hold spaces and parentheses, so fields count from
// the last parenthesis.
func parseStat(b []byte) (procStat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return procStat{}, errBadStat
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:open])))
	f := strings.Fields(string(b[end+1:])) // f[0] is field 3
	if err != nil || len(f) < 22 {
		return procStat{}, errBadStat
	}
	var bad error
	num := func(field int) int64 {
		n, err := strconv.ParseInt(f[field-3], 10, 64)
		if err != nil {
			bad = errBadStat
		}
		return n
	}
	st := procStat{
		pid: pid, state: f[0][0], ppid: int(num(4)), session: int(num(6)),
		cpu:    time.Duration(num(14)+num(15)) * tick,
		reaped: time.Duration(num(16)+num(17)) * tick,
		start:  uint64(num(22)), rss: num(24) * int64(os.Getpagesize()),
	}
	return st, bad
}

// alive reports whether the process runs (a zombie does not).
func (s procStat) alive() bool { return s.state != 'Z' && s.state != 'X' }

// allStats reads every process. Those that end meanwhile are left out.
func allStats() ([]procStat, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var all []procStat
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			if st, err := readStat(pid); err == nil {
				all = append(all, st)
			}
		}
	}
	return all, nil
}

// descendants lists every process below root, root left out.
func descendants(root int) ([]procStat, error) {
	all, err := allStats()
	if err != nil {
		return nil, err
	}
	children := make(map[int][]procStat)
	for _, st := range all {
		children[st.ppid] = append(children[st.ppid], st)
	}
	var out []procStat
	for queue := []int{root}; len(queue) > 0; queue = queue[1:] {
		out = append(out, children[queue[0]]...)
		for _, c := range children[queue[0]] {
			queue = append(queue, c.pid)
		}
	}
	return out, nil
}

// bootID is a random value that the kernel draws at each boot.
var bootID = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
})
