package proc

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProbe(t *testing.T) {
	c := probed()
	t.Logf("%+v", c)
	for what, pair := range map[string]struct {
		ok     bool
		reason string
	}{
		"cgroup": {c.CgroupParent != "", c.CgroupReason}, "limits": {c.Limits, c.LimitsReason},
		"isolation": {c.Isolation, c.IsolateReason}, "no network": {c.NoNetwork, c.NetworkReason},
		"reattach": {c.Reattach, c.ReattachReason},
	} {
		if pair.ok == (pair.reason != "") {
			t.Errorf("%s: works %v, reason %q", what, pair.ok, pair.reason)
		}
	}
	if c := Probe(context.Background(), ""); c.CgroupParent != "" || c.Limits || c.CgroupReason == "" {
		t.Errorf("without a parent: %+v", c)
	}
}

func TestCgroupHoldsTheTree(t *testing.T) {
	spec := sh(t, daemonScript+`sleep 1000 & wait`)
	spec.Cgroup = needCgroup(t)
	starter, id := mustStarter(t, spec)
	daemon := pidFrom(t, filepath.Join(spec.Dir, "daemon"))
	starter.Process.Kill()
	starter.Wait()
	p, err := Attach(id)
	if err != nil {
		t.Fatal(err)
	}
	mustEnd(t, p)
	for pid, leaf := range map[int]string{id.PID: leafShim, id.TaskPID: leafTask, daemon: leafTask} {
		pids, err := cgroupPIDs(filepath.Join(spec.Cgroup, leaf))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, have := range pids {
			found = found || have == pid
		}
		if !found {
			t.Errorf("%d is not in %s: %v", pid, leaf, pids)
		}
	}
	eventually(t, "usage of three processes", func() bool {
		u, err := p.Usage()
		return err == nil && u.Processes >= 3 && u.RSS > 0
	})
	other := spec
	other.StatusFile += "2"
	if _, err := Start(other); err == nil || !strings.Contains(err.Error(), "has processes in it") {
		t.Errorf("second start into the same group: %v", err)
	}
	if st, err := p.Stop(context.Background(), unix.SIGKILL, patience); err != nil || st.Signal != 9 {
		t.Errorf("stop: %+v, %v", st, err)
	}
	if running(daemon) {
		t.Error("the daemon is left")
	}
	if _, err := os.Stat(spec.Cgroup); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the group is left: %v", err)
	}
}

func TestLostSupervisorInCgroupLeavesNothing(t *testing.T) {
	spec := sh(t, daemonScript+`sleep 1000 & wait`)
	spec.Cgroup = needCgroup(t)
	p := mustStart(t, spec)
	daemon := pidFrom(t, filepath.Join(spec.Dir, "daemon"))
	if err := unix.Kill(p.Identity().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if st := mustWait(t, p); !st.Lost {
		t.Errorf("status %+v", st)
	}
	eventually(t, "daemon ends", func() bool { return !running(daemon) })
	if _, err := os.Stat(spec.Cgroup); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the group is left: %v", err)
	}
}

func TestClearCgroup(t *testing.T) {
	spec := sh(t, daemonScript+`sleep 1000 & wait`)
	spec.Cgroup = needCgroup(t)
	p := mustStart(t, spec)
	daemon := pidFrom(t, filepath.Join(spec.Dir, "daemon"))
	for range 2 { // the second time there is nothing left
		if err := ClearCgroup(spec.Cgroup); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(spec.Cgroup); !errors.Is(err, os.ErrNotExist) || running(daemon) || running(p.Identity().PID) {
			t.Errorf("something is left: %v", err)
		}
	}
}

func TestMemoryLimit(t *testing.T) {
	if c := probed(); !c.Limits {
		t.Skipf("no cgroup v2 limits here, run as root on a host with unified cgroups: %s", c.LimitsReason)
	}
	spec := sh(t, `x=a; while :; do x=$x$x; done`)
	spec.Cgroup = needCgroup(t)
	spec.Limits = Limits{MemoryBytes: 32 << 20, CPUShares: 500, CPUMillis: 900, PIDs: 50}
	if st, _ := mustRun(t, spec); !st.OOMKilled || st.Signal != 9 {
		t.Errorf("status %+v", st)
	}
}

func TestRefusedLimitsLeaveNoGroup(t *testing.T) {
	spec := sh(t, `exit 0`)
	spec.Cgroup = needCgroup(t)
	if probed().Limits {
		t.Skip("this host has the controllers; the refusal shows on one without")
	}
	spec.Limits.MemoryBytes = 1 << 30
	if _, err := Start(spec); !errors.Is(err, errNoController) || !strings.Contains(err.Error(), "memory") {
		t.Errorf("start: %v", err)
	}
	if _, err := os.Stat(spec.Cgroup); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the group is left: %v", err)
	}
}

func TestLimitFiles(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{
		"memory.max": "1048576", "memory.oom.group": "1", "cpu.weight": "4", "cpu.max": "150000 100000", "pids.max": "64",
	}
	for f := range files {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l := Limits{MemoryBytes: 1 << 20, CPUShares: 100, CPUMillis: 1500, PIDs: 64}
	if err := l.write(dir); err != nil { // memory.swap.max is missing, as on a kernel without swap accounting
		t.Fatal(err)
	}
	for f, want := range files {
		if b, _ := os.ReadFile(filepath.Join(dir, f)); string(b) != want {
			t.Errorf("%s holds %q, want %q", f, b, want)
		}
	}
	for shares, want := range map[int64]int64{0: 1, 2: 1, 262144: 10000, 1 << 40: 10000, 1024: 39} {
		if got := weight(shares); got != want {
			t.Errorf("weight(%d) = %d, want %d", shares, got, want)
		}
	}
}
