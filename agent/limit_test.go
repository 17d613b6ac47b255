package agent

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// TestRunTimeLimit: what has run for as long as its group allows is ended as if it were told to, has failed though
// it ended well, and is not begun again whatever its restart policy says. What follows the main tasks still runs.
func TestRunTimeLimit(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	main := shell("t", `echo "at most $RX_MAX_RUN_DURATION s"; trap 'echo told; exit 0' USR1; while :; do sleep 0.05; done`)
	main.KillSignal, main.KillTimeout = "SIGUSR1", 10*time.Minute
	after := shell("after", `echo after`)
	after.Lifecycle = &cluster.TaskLifecycle{Hook: cluster.HookPoststop}
	j, alloc := service(t, main, after)
	g := j.TaskGroups[0]
	g.RestartPolicy.Attempts = 5
	g.MaxRunDuration = 1500 * time.Millisecond
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	const text = "Run time limit of 1.5s reached"
	if !hasEvent(got, "t", cluster.EventRunLimit, text) || hasEvent(got, "t", "Restarting", "") || hasEvent(got, "after", cluster.EventRunLimit, "") {
		t.Errorf("events %s, %s", kinds(got, "t"), kinds(got, "after"))
	}
	if st := got.TaskStates; !st["t"].Failed || st["after"].Failed || got.ClientDescription != text || !got.OverLimit() {
		t.Errorf("%q: %+v %+v", got.ClientDescription, st["t"], st["after"])
	}
	waitLog(t, s, "t", "at most 1.5 s\ntold\n")
	waitLog(t, s, "after", "after\n")
}

// TestRunTimeLimitCountsFromTheFirstStart: neither restarts of the task nor those of the agent make it longer.
func TestRunTimeLimitCountsFromTheFirstStart(t *testing.T) {
	s := newFleetServer(t)
	dir := t.TempDir()
	clearing(t, s, dir)
	k := startChild(t, childConfig{DataDir: dir, Server: s.address})
	put := func(id, script string, limit time.Duration) {
		j, alloc := service(t, shell("t", script))
		j.ID, alloc.JobID, alloc.ID = id, id, id
		j.TaskGroups[0].MaxRunDuration = limit
		j.TaskGroups[0].RestartPolicy = &cluster.RestartPolicy{Attempts: 1_000_000, Interval: time.Hour, Delay: time.Millisecond, Mode: "fail"}
		s.run(j, alloc)
	}
	const limit = 2 * time.Second
	up := filepath.Join(t.TempDir(), "up")
	put("lasts", "touch "+up+"; exec sleep 600", limit)
	put("breaks", "exit 1", limit)
	s.waitStatus(t, "lasts", cluster.AllocClientRunning)
	began := s.alloc("lasts").TaskStates["t"].StartedAt
	if got := s.waitStatus(t, "breaks", cluster.AllocClientFailed); !got.OverLimit() || got.TaskStates["t"].Restarts == 0 {
		t.Errorf("one that breaks again and again: %s, %d restarts", kinds(got, "t"), got.TaskStates["t"].Restarts)
	}

	put("outlives", "exec sleep 600", limit)
	s.waitStatus(t, "outlives", cluster.AllocClientRunning)
	pid := taskPID(t, dir, "outlives")
	k.end(syscall.SIGKILL)
	begun := s.alloc("outlives").TaskStates["t"].StartedAt
	waitFor(t, "the limit to pass without an agent", func() bool { return time.Now().After(begun.Add(limit).Std()) })
	if _, err := os.Stat(up); err != nil || !alive(pid) {
		t.Fatalf("the task did not outlive its agent: %v", err)
	}
	s.change(func() { clear(s.reported) })
	startChild(t, childConfig{DataDir: dir, Server: s.address})
	for id, at := range map[string]cluster.Time{"outlives": begun, "lasts": began} {
		got := s.waitStatus(t, id, cluster.AllocClientFailed)
		if st := got.TaskStates["t"]; st.StartedAt != at || st.Restarts != 0 || !hasEvent(got, "t", cluster.EventRunLimit, "Run time limit of 2s reached") {
			t.Errorf("%s: %+v, %s", id, st, kinds(got, "t"))
		}
	}
}
