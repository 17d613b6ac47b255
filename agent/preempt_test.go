package agent

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// evict tells the agent that an allocation makes room for another.
func evict(s *fleetServer) {
	s.edit(allocID, func(a *cluster.Allocation) { a.DesiredStatus = cluster.AllocDesiredEvict })
}

// TestNoticeBeforeTheEnd: a task that is preempted is told so, saves its work within its grace, is
// not begun again whatever its restart policy says, and its last checkpoint is reported with its end.
func TestNoticeBeforeTheEnd(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("t", `echo "from step $RX_CHECKPOINT_STEP at $RX_CHECKPOINT_PATH, rank $RX_GANG_RANK of $RX_GANG_SIZE"
trap 'echo "{\"step\": 42, \"path\": \"/ckpt/42\"}" > $NOMAD_TASK_DIR/rx_checkpoint.json; exit 3' USR1
while :; do sleep 0.05; done`))
	alloc.Checkpoints = map[string]*cluster.Checkpoint{"t": {Step: 7, Path: "/ckpt/7", Time: 1}}
	g := j.TaskGroups[0]
	g.RestartPolicy.Attempts = 5
	g.Count, g.Gang = 4, &cluster.Gang{}
	g.Preempt = &cluster.PreemptPolicy{Signal: "SIGUSR1", Grace: 10 * time.Minute}
	s.run(j, alloc)
	waitLog(t, s, "t", "from step 7 at /ckpt/7, rank 0 of 4\n")
	evict(s)
	got := s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if c := got.Checkpoints["t"]; c == nil || c.Step != 42 || c.Path != "/ckpt/42" || c.Time == 0 {
		t.Errorf("checkpoint %+v", c)
	}
	if !hasEvent(got, "t", "Signaling", "may save its work for 10m0s") || hasEvent(got, "t", "Restarting", "") || hasEvent(got, "t", "Killing", "") {
		t.Errorf("events %s", kinds(got, "t"))
	}
}

// TestGraceHasAnEnd: who does not end when he is told to is ended.
func TestGraceHasAnEnd(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("t", `trap 'echo told' TERM; echo up; while :; do sleep 0.05; done`))
	task := j.TaskGroups[0].Tasks[0]
	task.KillSignal, task.KillTimeout = "SIGINT", 10*time.Minute
	j.TaskGroups[0].Preempt = &cluster.PreemptPolicy{Grace: time.Second}
	s.run(j, alloc)
	waitLog(t, s, "t", "up\n")
	evict(s)
	got := s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if !hasEvent(got, "t", "Killing", "") {
		t.Errorf("events %s", kinds(got, "t"))
	}
	waitLog(t, s, "t", "up\ntold\n")
	if e := got.TaskStates["t"].Events; e[len(e)-2].Signal != int(syscall.SIGINT) && e[len(e)-2].ExitCode != 130 {
		t.Errorf("it ended by %+v", e[len(e)-2])
	}
}

func TestCheckpointFile(t *testing.T) {
	for text, want := range map[string]string{
		`{"step": 3}`: "",
		`{"step": 3, "path": "/c", "time": "2026-01-02T15:04:05Z"}`: "",
		`{"path": "/c"}`:             "names no step",
		`{"step": -1}`:               "names no step",
		`{"step": 1, "stop": 2}`:     "unknown field",
		`x`:                          "is no JSON",
		strings.Repeat(" ", 1<<13):   "more than 4096 bytes",
		`{"step": 1, "time": "now"}`: "is no JSON",
		`{"step": 1, "path": "` + strings.Repeat("x", 2000) + `"}`: "at most 1024 are allowed",
	} {
		c, err := parseCheckpoint([]byte(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) || err == nil && c.Step != 3 {
			t.Errorf("%.40s: %+v, %v; want %q", text, c, err, want)
		}
	}
}
