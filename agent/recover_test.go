package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/cluster"
)

// childConfig is what an agent in a process of its own is told.
type childConfig struct {
	DataDir, Server, Executable, Cgroup string
	StopTasks                           bool
}

// agentChild is the agent in a process of its own. It ends cleanly on SIGTERM.
func agentChild(config string) int {
	var c childConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	a, err := New(ctx, Config{
		DataDir: c.DataDir, Servers: []string{c.Server}, HTTPAddr: "none", Name: "child", RawExec: true, Cgroup: c.Cgroup,
		Executable: c.Executable, ORTLibrary: c.Executable, GPUs: gpu.None{}, StopTasksOnExit: c.StopTasks,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err == nil {
		fmt.Println("up")
		err = a.Run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// child is an agent in a process of its own.
type child struct {
	cmd *exec.Cmd
	log *lines
}

func startChild(t *testing.T, c childConfig) *child {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Executable, c.Cgroup = exe, testCgroup
	arg, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	k := &child{cmd: exec.Command(exe, "agent-child", string(arg)), log: &lines{}}
	k.cmd.Stderr = k.log
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		k.end(syscall.SIGKILL)
		if t.Failed() {
			t.Log(k.log.b.String())
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) || line != "up\n" {
		t.Fatalf("the agent did not come up: %q %v\n%s", line, err, k.log.b.String())
	}
	return k
}

// end sends a signal and waits for the process to be gone.
func (k *child) end(sig syscall.Signal) {
	if k.cmd.ProcessState == nil {
		_ = k.cmd.Process.Signal(sig)
		_ = k.cmd.Wait()
	}
}

// clearing ends what a killed agent left, by an agent that clears up.
func clearing(t *testing.T, s *fleetServer, dir string) {
	t.Cleanup(func() {
		s.change(func() { clear(s.allocs) })
		cfg := testConfig(t, s)
		cfg.DataDir = dir
		a := startAgent(t, cfg)
		waitFor(t, "all tasks to end", func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.client != nil && len(a.runners) == 0
		})
	})
}

func TestKilledAgentIsSucceeded(t *testing.T) {
	s := newFleetServer(t)
	dir := t.TempDir()
	clearing(t, s, dir)
	k := startChild(t, childConfig{DataDir: dir, Server: s.address})
	update := &cluster.UpdateStrategy{MinHealthyTime: time.Millisecond, HealthyDeadline: time.Hour}

	put := func(id string, kind string, x *cluster.Task) *cluster.Allocation {
		j, alloc := service(t, x)
		j.ID, alloc.JobID, alloc.ID, j.Type, j.TaskGroups[0].Update, alloc.DeploymentID = id, id, id, kind, update, "d"
		s.run(j, alloc)
		return alloc
	}
	model := put("model", cluster.JobTypeService, onnxTask("t", s.model("a model")))
	gate := filepath.Join(t.TempDir(), "gate")
	wait := `while [ ! -e ` + gate + ` ]; do sleep 0.05; done; `
	put("ends-well", cluster.JobTypeBatch, shell("t", wait+"exit 0"))
	put("ends-badly", cluster.JobTypeBatch, shell("t", wait+"exit 7"))
	put("vanishes", cluster.JobTypeService, shell("t", "exec sleep 600"))
	for _, id := range []string{"ends-well", "ends-badly", "vanishes"} {
		s.waitStatus(t, id, cluster.AllocClientRunning)
	}
	s.waitHealth(t, "model", true)
	pid := taskPID(t, dir, "vanishes")
	s.wait(t, "the model's process", func() bool { return s.reported["model"].TaskStates["t"].StartedAt != 0 })
	started := s.alloc("model").TaskStates["t"].StartedAt

	k.end(syscall.SIGKILL)
	post(t, model, "/ready") // it serves while no agent is there
	if err := os.WriteFile(gate, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.change(func() { delete(s.allocs, "vanishes"); clear(s.reported) })

	startChild(t, childConfig{DataDir: dir, Server: s.address})
	got := s.waitStatus(t, "ends-well", cluster.AllocClientComplete)
	if st := got.TaskStates["t"]; st.Restarts != 0 || !hasEvent(got, "t", "Terminated", "Exit Code: 0") {
		t.Errorf("ends-well: %+v %s", st, kinds(got, "t"))
	}
	got = s.waitStatus(t, "ends-badly", cluster.AllocClientFailed)
	if !hasEvent(got, "t", "Terminated", "Exit Code: 7") {
		t.Errorf("ends-badly: %s", kinds(got, "t"))
	}
	got = s.waitStatus(t, "model", cluster.AllocClientRunning)
	if st := got.TaskStates["t"]; st.Restarts != 0 || st.StartedAt != started || got.Serving == nil || !got.Serving.Ready {
		t.Errorf("model: %+v %+v", st, got.Serving)
	}
	if got.DeploymentStatus == nil || !*got.DeploymentStatus.Healthy {
		t.Errorf("model: the verdict on its health is lost: %+v", got.DeploymentStatus)
	}
	waitFor(t, "the vanished allocation's task to end", func() bool { return !alive(pid) })
	post(t, model, "/crash")
	s.waitEvent(t, "model", "t", "Terminated", "segmentation fault")
}

// taskPID finds a task's process by its environment.
func taskPID(t *testing.T, dir, alloc string) int {
	t.Helper()
	var found int
	waitFor(t, "the process of "+alloc, func() bool {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			env, _ := os.ReadFile("/proc/" + e.Name() + "/environ")
			if strings.Contains(string(env), "NOMAD_ALLOC_ID="+alloc+"\x00") && strings.Contains(string(env), dir) {
				found, _ = strconv.Atoi(e.Name())
				return true
			}
		}
		return false
	})
	return found
}

func alive(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// processes counts those that have an agent's data folder in their environment.
func processes(dir string) (n int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		env, _ := os.ReadFile("/proc/" + e.Name() + "/environ")
		if strings.Contains(string(env), "NOMAD_TASK_DIR="+dir) {
			n++
		}
	}
	return n
}

// TestKilledAtAnyMoment kills the agent again and again while it starts a task,
// and wants one process in the end: none forgotten, none started twice.
func TestKilledAtAnyMoment(t *testing.T) {
	s := newFleetServer(t)
	dir := t.TempDir()
	clearing(t, s, dir)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	j, alloc := service(t, shell("t", `echo run; exec sleep 600`))
	for round := range 6 {
		id := fmt.Sprintf("%08d-67e5-efac-7b92-e754dc4a5431", round)
		k := startChild(t, childConfig{DataDir: dir, Server: s.address})
		s.wait(t, "the agent", func() bool { return s.out != nil })
		next := cluster.Clone(alloc)
		next.ID = id
		next.AllocatedResources.Shared.Ports = nil
		s.run(j, next)
		time.Sleep(time.Duration(random.IntN(150)) * time.Millisecond) // the moment is the point of the test
		k.end(syscall.SIGKILL)

		k = startChild(t, childConfig{DataDir: dir, Server: s.address})
		s.waitStatus(t, id, cluster.AllocClientRunning)
		waitFor(t, "one process for each allocation", func() bool { return processes(dir) == round+1 })
		var b []byte
		waitFor(t, "the task's first words", func() (said bool) { // its process may have begun only just now
			b, _ = os.ReadFile(filepath.Join(dir, "alloc", id, "alloc", "logs", "t.stdout.0"))
			return len(b) > 0
		})
		if string(b) != "run\n" {
			t.Errorf("round %d: log %q", round, b)
		}
		k.end(syscall.SIGKILL)
	}
}

func TestTasksEndWithTheAgentOnRequest(t *testing.T) {
	s := newFleetServer(t)
	dir := t.TempDir()
	clearing(t, s, dir)
	k := startChild(t, childConfig{DataDir: dir, Server: s.address, StopTasks: true})
	j, alloc := service(t, shell("t", `echo up; trap 'echo bye; exit 0' INT; while :; do sleep 0.05; done`))
	s.run(j, alloc)
	waitLog(t, s, "t", "up\n")
	k.end(syscall.SIGTERM)
	if n := processes(dir); n != 0 {
		t.Errorf("%d processes run on", n)
	}
	if got := s.alloc(allocID); got.ClientTerminal() {
		t.Errorf("the allocation is %s: it would not start again", got.ClientStatus)
	}
	s.change(func() { clear(s.reported) })
	startChild(t, childConfig{DataDir: dir, Server: s.address, StopTasks: true})
	got := s.waitStatus(t, allocID, cluster.AllocClientRunning)
	if st := got.TaskStates["t"]; st.Restarts != 0 {
		t.Errorf("it counts as a restart: %+v", st)
	}
	waitLog(t, s, "t", "up\nbye\nup\n")
}

// A node starts what it knows of while no server can be reached.
func TestStartWithoutServers(t *testing.T) {
	s := newFleetServer(t)
	dir := t.TempDir()
	clearing(t, s, dir)
	k := startChild(t, childConfig{DataDir: dir, Server: s.address, StopTasks: true})
	j, alloc := service(t, shell("t", `echo up; exec sleep 600`))
	s.run(j, alloc)
	waitLog(t, s, "t", "up\n")
	k.end(syscall.SIGTERM)
	s.stop()
	k = startChild(t, childConfig{DataDir: dir, Server: s.address})
	waitFor(t, "the second start", func() bool {
		b, _ := os.ReadFile(filepath.Join(dir, "alloc", allocID, "alloc", "logs", "t.stdout.0"))
		return string(b) == "up\nup\n"
	})
	k.end(syscall.SIGKILL)
	s.listen(t, s.address)
}
