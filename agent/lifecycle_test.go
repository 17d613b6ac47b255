package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// phased is a shell task with a lifecycle block that writes its name and the words begin
// and end into the allocation's diary.
func phased(name, hook string, sidecar bool, script string) *cluster.Task {
	t := shell(name, `note() { echo "$1" >> "$NOMAD_ALLOC_DIR/diary"; }; note `+name+`; `+script)
	if hook != "" {
		t.Lifecycle = &cluster.TaskLifecycle{Hook: hook, Sidecar: sidecar}
	}
	return t
}

// diary reads what the tasks of the allocation have written, in their order.
func diary(cfg Config) string {
	b, _ := os.ReadFile(filepath.Join(cfg.DataDir, "alloc", allocID, "alloc", "diary")) // none yet: nobody has written
	return strings.Join(strings.Fields(string(b)), " ")
}

// lives ends well when told to, after it has noted that.
const lives = `trap 'note $NOMAD_TASK_NAME-end; exit 0' INT TERM; while :; do sleep 0.05; done`

func TestTasksAroundTheMainOnes(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	halting(t, s, startAgent(t, cfg))
	j, alloc := service(t,
		phased("clean", cluster.HookPoststop, false, "true"),
		phased("web", "", false, lives),
		phased("warm", cluster.HookPoststart, false, "note warm-end"),
		phased("side", cluster.HookPoststart, true, lives),
		phased("init", cluster.HookPrestart, false, "sleep 0.3; note init-end"),
	)
	s.run(j, alloc)
	s.wait(t, "all but the last to have run", func() bool {
		a := s.reported[allocID]
		if a == nil || a.ClientStatus != cluster.AllocClientRunning {
			return false
		}
		st := a.TaskStates
		return st["web"].State == "running" && st["side"].State == "running" && st["warm"].State == "dead" && st["init"].State == "dead"
	})
	got := s.alloc(allocID)
	if st := got.TaskStates; st["init"].Failed || st["init"].Restarts > 0 || st["warm"].Failed || st["clean"].State != "pending" {
		t.Errorf("init %+v, warm %+v, clean %+v", st["init"], st["warm"], st["clean"])
	}
	waitFor(t, "both to note that they live", func() bool { d := diary(cfg); return strings.Contains(d, "web") && strings.Contains(d, "side") })
	if d := diary(cfg); !strings.HasPrefix(d, "init init-end web") {
		t.Errorf("they ran as %s", d)
	}
	s.halt(allocID)
	got = s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if d := diary(cfg); !strings.HasSuffix(d, "web-end side-end clean") {
		t.Errorf("they ended as %s", d)
	}
	if c := got.TaskStates["clean"]; c.State != "dead" || c.Failed {
		t.Errorf("the poststop task is %+v", c)
	}
}

// TestSidecarsEndWithTheMainTasks: nothing but sidecars is left of batch work.
func TestSidecarsEndWithTheMainTasks(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	halting(t, s, startAgent(t, cfg))
	j, alloc := service(t,
		phased("side", cluster.HookPrestart, true, lives),
		phased("work", "", false, "sleep 0.3; note work-end"),
		phased("clean", cluster.HookPoststop, false, "true"),
	)
	j.Type = cluster.JobTypeBatch
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if d := diary(cfg); !strings.HasSuffix(d, "work-end side-end clean") {
		t.Errorf("they ran as %s", d)
	}
	if !hasEvent(got, "side", "Main Tasks Dead", "Main tasks in the group died") {
		t.Errorf("side: %s", kinds(got, "side"))
	}
}

// TestPrestartThatFails: the main task never starts, and what cleans up runs.
func TestPrestartThatFails(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	halting(t, s, startAgent(t, cfg))
	j, alloc := service(t,
		phased("init", cluster.HookPrestart, false, "exit 3"),
		phased("web", "", false, lives),
		phased("clean", cluster.HookPoststop, false, "true"),
	)
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	if d := diary(cfg); d != "init clean" {
		t.Errorf("they ran as %s", d)
	}
	if st := got.TaskStates; !st["init"].Failed || st["web"].StartedAt != 0 || st["web"].Failed || st["clean"].Failed {
		t.Errorf("init %+v, web %+v, clean %+v", st["init"], st["web"], st["clean"])
	}
}

// TestHealthIsThatOfTheMainTasks: what has run once before them does not keep an
// allocation from being healthy.
func TestHealthIsThatOfTheMainTasks(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t,
		phased("init", cluster.HookPrestart, false, "true"),
		phased("web", "", false, lives),
		phased("clean", cluster.HookPoststop, false, "true"),
	)
	alloc.DeploymentID = "d-1"
	j.TaskGroups[0].Update = &cluster.UpdateStrategy{HealthCheck: "task_states", MinHealthyTime: 50 * time.Millisecond, HealthyDeadline: time.Hour}
	s.run(j, alloc)
	s.waitHealth(t, allocID, true)
}

// TestAgentDiesBetweenTasks: the next agent does not run again what has run, and goes on
// with what has not.
func TestAgentDiesBetweenTasks(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	first := startAgent(t, cfg)
	j, alloc := service(t,
		phased("init", cluster.HookPrestart, false, "true"),
		phased("web", "", false, lives),
		phased("clean", cluster.HookPoststop, false, "true"),
	)
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientRunning)
	waitFor(t, "the main task", func() bool { return strings.Contains(diary(cfg), "web") })
	first.stop()
	halting(t, s, startAgent(t, cfg))
	s.wait(t, "the next agent", func() bool { return s.out != nil })
	s.halt(allocID)
	s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if d := diary(cfg); d != "init web web-end clean" {
		t.Errorf("they ran as %s", d)
	}
}
