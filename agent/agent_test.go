package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// lines is a log for tests.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

func testConfig(t *testing.T, s *fleetServer) Config {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		DataDir: t.TempDir(), Servers: []string{s.address}, HTTPAddr: "127.0.0.1:0", Name: "here", RawExec: true,
		Cgroup: testCgroup, Executable: exe, ORTLibrary: exe, GPUs: gpu.None{}, Version: "test",
	}
}

// running is an agent in this process.
type running struct {
	*Agent
	log  *lines
	stop func()
}

func startAgent(t *testing.T, cfg Config) *running {
	t.Helper()
	out := &lines{}
	cfg.Log = slog.New(slog.NewTextHandler(out, nil))
	a, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("agent: %v", err)
			}
		case <-time.After(patience):
			t.Error("the agent did not end")
		}
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Log(out.b.String())
		}
	})
	return &running{a, out, stop}
}

// halting makes the end of a test end what runs.
func halting(t *testing.T, s *fleetServer, a *running) {
	t.Cleanup(func() {
		s.wait(t, "an agent that can clear up", func() bool { return s.out != nil })
		s.change(func() {
			clear(s.allocs)
			s.out <- s.desired(true)
		})
		waitFor(t, "all tasks to end", func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(a.runners) == 0
		})
	})
}

const allocID = "0f43382e-67e5-efac-7b92-e754dc4a5431"

func shell(name, script string) *cluster.Task {
	config, _ := json.Marshal(map[string]any{"command": "sh", "args": []string{"-c", script}})
	return &cluster.Task{
		Name: name, Driver: "raw_exec", Config: config, KillTimeout: 10 * time.Second,
		LogConfig: &cluster.LogConfig{MaxFiles: 3, MaxFileSizeMB: 1},
	}
}

func onnxTask(name string, ref *cluster.ModelRef) *cluster.Task {
	return &cluster.Task{
		Name: name, Driver: "onnx", Config: json.RawMessage(`{"model":"m"}`), KillTimeout: 10 * time.Second, Model: ref,
		LogConfig: &cluster.LogConfig{MaxFiles: 3, MaxFileSizeMB: 1},
	}
}

// service is a job of one group with an allocation for it.
func service(t *testing.T, tasks ...*cluster.Task) (*cluster.Job, *cluster.Allocation) {
	t.Helper()
	j := &cluster.Job{
		ID: "web", Name: "web", Namespace: "default", Type: cluster.JobTypeService,
		TaskGroups: []*cluster.TaskGroup{{
			Name: "g", Count: 1, Tasks: tasks,
			RestartPolicy: &cluster.RestartPolicy{Attempts: 0, Interval: time.Hour, Mode: "fail"},
		}},
	}
	a := &cluster.Allocation{
		ID: allocID, Namespace: "default", Name: "web.g[0]", JobID: "web", TaskGroup: "g", NodeID: "n", Epoch: 10,
		DesiredStatus: cluster.AllocDesiredRun, ClientStatus: cluster.AllocClientPending,
		AllocatedResources: &cluster.AllocatedResources{
			Tasks: map[string]*cluster.AllocatedTaskResources{},
			Shared: cluster.AllocatedSharedResources{Ports: []cluster.PortMapping{
				{Label: "http", Value: freePort(t), HostIP: "127.0.0.1"},
			}},
		},
	}
	for _, x := range tasks {
		a.AllocatedResources.Tasks[x.Name] = &cluster.AllocatedTaskResources{
			Cpu: cluster.AllocatedCPU{CpuShares: 100}, Memory: cluster.AllocatedMemory{MemoryMB: 256},
		}
	}
	return j, a
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func hasEvent(a *cluster.Allocation, task, kind, text string) bool {
	if a == nil || a.TaskStates[task] == nil {
		return false
	}
	for _, e := range a.TaskStates[task].Events {
		if e.Type == kind && strings.Contains(e.DisplayMessage, text) {
			return true
		}
	}
	return false
}

func kinds(a *cluster.Allocation, task string) string {
	var all []string
	for _, e := range a.TaskStates[task].Events {
		all = append(all, e.Type)
	}
	return strings.Join(all, ", ")
}

func TestLifeOfATask(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	j, alloc := service(t, shell("t", `echo "hello from $NOMAD_ALLOC_ID"; trap 'echo bye; exit 0' INT; while :; do sleep 0.05; done`))
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientRunning)
	if got.ClientDescription != "Tasks are running" || got.Epoch != 10 || got.TaskStates["t"].StartedAt == 0 {
		t.Errorf("running: %+v", got)
	}
	waitLog(t, s, "t", "hello from "+allocID+"\n")

	s.halt(allocID)
	got = s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if want := "Received, Task Setup, Started, Killing, Terminated, Killed"; kinds(got, "t") != want {
		t.Errorf("events %s, want %s", kinds(got, "t"), want)
	}
	for kind, text := range map[string]string{
		"Received": "Task received by client", "Task Setup": "Building Task Directory", "Started": "Task started by client",
		"Killing": "Sent interrupt. Waiting 10s before force killing", "Terminated": "Exit Code: 0", "Killed": "Task successfully killed",
	} {
		if !hasEvent(got, "t", kind, text) {
			t.Errorf("no event %s: %s", kind, text)
		}
	}
	if st := got.TaskStates["t"]; st.State != "dead" || st.Failed || st.FinishedAt == 0 || got.ClientDescription != "All tasks have completed" {
		t.Errorf("ended: %+v %q", st, got.ClientDescription)
	}

	dir := filepath.Join(a.cfg.DataDir, "alloc", allocID)
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("the directory of an ended allocation: %v", err)
	}
	s.want(func() { delete(s.allocs, allocID) }, allocID)
	waitFor(t, "the allocation to be forgotten", func() bool { return a.runner(allocID) == nil })
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory of a forgotten allocation: %v", err)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func logsCall(task string, follow bool) *pb.Call {
	return &pb.Call{Request: &pb.Call_Logs{Logs: &pb.LogsRequest{AllocId: allocID, Task: task, Type: "stdout", Follow: follow, Origin: "start"}}}
}

func waitLog(t *testing.T, s *fleetServer, task, want string) {
	t.Helper()
	var got []byte
	waitFor(t, fmt.Sprintf("log %q", want), func() bool {
		got, _, _ = s.ask(t, logsCall(task, false))
		return string(got) == want
	})
}

func TestRestartPolicyOnRealProcesses(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("t", "exit 3"))
	j.TaskGroups[0].RestartPolicy = &cluster.RestartPolicy{Attempts: 2, Interval: time.Hour, Delay: time.Millisecond, Mode: "fail"}
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	st := got.TaskStates["t"]
	if st.Restarts != 2 || !st.Failed || got.ClientDescription != "Failed tasks" || st.LastRestart == 0 {
		t.Errorf("state %+v, %q", st, got.ClientDescription)
	}
	for kind, text := range map[string]string{
		"Terminated": "Exit Code: 3", "Restarting": "Task restarting in ",
		"Not Restarting": `Exceeded allowed attempts 2 in interval 1h0m0s and mode is "fail"`,
	} {
		if !hasEvent(got, "t", kind, text) {
			t.Errorf("no event %s: %s in %s", kind, text, kinds(got, "t"))
		}
	}
	for _, e := range st.Events {
		if e.Type == "Terminated" && (e.ExitCode != 3 || e.Details["exit_code"] != "3") {
			t.Errorf("terminated: %+v", e)
		}
	}
}

func TestBatchCompletes(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("t", "echo done"))
	j.Type = cluster.JobTypeBatch
	j.TaskGroups[0].RestartPolicy.Attempts = 3
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if st := got.TaskStates["t"]; st.Restarts != 0 || st.Failed {
		t.Errorf("state %+v", st)
	}
}

func TestSiblingsAndLeader(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("bad", "sleep 0.2; exit 1"), shell("good", "exec sleep 600"))
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	if !hasEvent(got, "good", "Sibling Task Failed", `Task's sibling "bad" failed`) || got.TaskStates["good"].Failed || !got.TaskStates["bad"].Failed {
		t.Errorf("good: %s; %+v", kinds(got, "good"), got.TaskStates["good"])
	}

	lead := shell("lead", "sleep 0.2")
	lead.Leader = true
	j, alloc = service(t, lead, shell("side", "exec sleep 600"))
	j.Type, j.ID, alloc.JobID, alloc.ID = cluster.JobTypeBatch, "b", "b", "11111111-67e5-efac-7b92-e754dc4a5431"
	s.run(j, alloc)
	got = s.waitStatus(t, alloc.ID, cluster.AllocClientComplete)
	if !hasEvent(got, "side", "Leader Task Dead", "Leader Task in Group dead") {
		t.Errorf("side: %s", kinds(got, "side"))
	}
}

func TestFaultsBeforeTheStart(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "artifact") }))
	defer web.Close()
	zeros := strings.Repeat("0", 64)
	for i, c := range []struct {
		name, kind, text string
		change           func(x *cluster.Task)
	}{
		{"no such program", "Driver Failure", "/no/such", func(x *cluster.Task) { x.Config = json.RawMessage(`{"command":"/no/such"}`) }},
		{"no such driver", "Driver Failure", `driver "docker" is not on this node`, func(x *cluster.Task) { x.Driver = "docker" }},
		{"template", "Setup Failure", `function "key" not defined`, func(x *cluster.Task) {
			x.Templates = []*cluster.Template{{EmbeddedTmpl: `{{ key "a" }}`, DestPath: "local/x"}}
		}},
		{"checksum", "Failed Artifact Download", "expected sha256:" + zeros + ", got sha256:", func(x *cluster.Task) {
			x.Artifacts = []*cluster.Artifact{{GetterSource: web.URL + "/a", GetterOptions: map[string]string{"checksum": "sha256:" + zeros}}}
		}},
	} {
		x := shell("t", "exec sleep 600")
		c.change(x)
		j, alloc := service(t, x)
		alloc.ID = fmt.Sprintf("%08d-67e5-efac-7b92-e754dc4a5431", i)
		j.ID, alloc.JobID = c.name, c.name
		s.run(j, alloc)
		if got := s.waitStatus(t, alloc.ID, cluster.AllocClientFailed); !hasEvent(got, "t", c.kind, c.text) {
			t.Errorf("%s: no event %s: %s among %+v", c.name, c.kind, c.text, got.TaskStates["t"].Events[len(got.TaskStates["t"].Events)-1])
		}
	}
}

func TestRestartAndSignalCalls(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("t", `trap 'echo hup' HUP; trap 'exit 0' INT; echo up; while :; do sleep 0.05; done`))
	s.run(j, alloc)
	waitLog(t, s, "t", "up\n")
	s.waitStatus(t, allocID, cluster.AllocClientRunning) // the agent knows it too
	signal := func(name string) error {
		_, _, err := s.ask(t, &pb.Call{Request: &pb.Call_Signal{Signal: &pb.SignalRequest{AllocId: allocID, Signal: name}}})
		return err
	}
	if err := signal("SIGHUP"); err != nil {
		t.Fatal(err)
	}
	waitLog(t, s, "t", "up\nhup\n")
	s.waitEvent(t, allocID, "t", "Signaling", "Task being sent a signal")
	if err := signal("SIGNOPE"); cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("unknown signal: %v", err)
	}
	restart := func(task string) error {
		_, _, err := s.ask(t, &pb.Call{Request: &pb.Call_Restart{Restart: &pb.RestartRequest{AllocId: allocID, Task: task}}})
		return err
	}
	if err := restart("nosuch"); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("unknown task: %v", err)
	}
	if err := restart(""); err != nil {
		t.Fatal(err)
	}
	waitLog(t, s, "t", "up\nhup\nup\n")
	got := s.waitEvent(t, allocID, "t", "Restart Signaled", "User requested running tasks to restart")
	if st := got.TaskStates["t"]; st.Failed {
		t.Errorf("state %+v", st)
	}
	s.halt(allocID)
	s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if err := restart(""); err == nil || err.Error() != "Task not running" {
		t.Errorf("restart of an ended task: %v", err)
	}
	if err := signal("SIGHUP"); err == nil || err.Error() != "Task not running" {
		t.Errorf("signal to an ended task: %v", err)
	}
}

// healthy waits for the verdict on an allocation of a deployment.
func (s *fleetServer) waitHealth(t *testing.T, id string, want bool) *cluster.Allocation {
	t.Helper()
	var got *cluster.Allocation
	s.wait(t, fmt.Sprintf("health %v", want), func() bool {
		got = s.reported[id]
		return got != nil && got.DeploymentStatus != nil && got.DeploymentStatus.Healthy != nil
	})
	if *got.DeploymentStatus.Healthy != want {
		t.Fatalf("healthy is %v, want %v", !want, want)
	}
	return got
}

func TestHealthOfDeployments(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	update := &cluster.UpdateStrategy{HealthCheck: "task_states", MinHealthyTime: 50 * time.Millisecond, HealthyDeadline: time.Hour}
	deploy := func(id string, x *cluster.Task) {
		j, alloc := service(t, x)
		j.ID, alloc.JobID, alloc.ID, alloc.DeploymentID, j.TaskGroups[0].Update = id, id, id, "d-"+id, update
		s.run(j, alloc)
	}
	deploy("runs", shell("t", "exec sleep 600"))
	s.waitHealth(t, "runs", true)
	quick := update
	update = &cluster.UpdateStrategy{HealthCheck: "task_states", MinHealthyTime: time.Minute, HealthyDeadline: time.Hour} // a busy machine is slow to see an end
	deploy("fails", shell("t", "exit 1"))
	got := s.waitHealth(t, "fails", false)
	update = quick
	s.waitEvent(t, "fails", "t", "Alloc Unhealthy", "Unhealthy because of failed task")
	if got.DeploymentStatus.Timestamp == 0 {
		t.Error("the verdict has no time")
	}
	deploy("ready", onnxTask("t", s.model("fine")))
	if got := s.waitHealth(t, "ready", true); got.Serving == nil || !got.Serving.Ready {
		t.Errorf("healthy without a ready model: %+v", got.Serving)
	}
	update = &cluster.UpdateStrategy{MinHealthyTime: 50 * time.Millisecond, HealthyDeadline: 300 * time.Millisecond}
	deploy("never", onnxTask("t", s.model("never")))
	s.waitHealth(t, "never", false)
	s.waitEvent(t, "never", "t", "Alloc Unhealthy", "Model not ready for min_healthy_time of 50ms by deadline")

	// The next deployment keeps an allocation as it is and judges it anew.
	s.edit("runs", func(a *cluster.Allocation) { a.DeploymentID, a.DeploymentStatus = "d-2", nil })
	s.mu.Lock()
	first := s.reported["runs"].DeploymentStatus.Timestamp
	s.mu.Unlock()
	s.wait(t, "the second verdict", func() bool {
		ds := s.reported["runs"].DeploymentStatus
		return ds != nil && *ds.Healthy && ds.Timestamp > first
	})
}

// post asks the fake worker of an allocation something.
func post(t *testing.T, alloc *cluster.Allocation, path string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Post("http://"+address(alloc)+path, "", nil)
	if err != nil && path != "/crash" {
		t.Fatal(err)
	}
	if err == nil {
		resp.Body.Close()
	}
}

func address(alloc *cluster.Allocation) string {
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(alloc.AllocatedResources.Shared.Ports[0].Value))
}

func TestServing(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, onnxTask("m", s.model("a model")))
	j.TaskGroups[0].RestartPolicy = &cluster.RestartPolicy{Attempts: 3, Interval: time.Hour, Delay: time.Millisecond, Mode: "fail"}
	s.run(j, alloc)
	ready := func(want bool) func() bool {
		return func() bool {
			a := s.reported[allocID]
			return a != nil && a.Serving != nil && a.Serving.Ready == want
		}
	}
	s.wait(t, "a ready model", ready(true))
	want := cluster.Serving{Task: "m", Model: "m", Version: 3, Address: address(alloc), Ready: true}
	if got := s.alloc(allocID).Serving; *got != want {
		t.Errorf("serving %+v, want %+v", *got, want)
	}
	s.waitEvent(t, allocID, "m", "Driver", "Model m version 3 is ready at "+address(alloc))

	post(t, alloc, "/unready")
	s.wait(t, "a model that is not ready", ready(false))
	post(t, alloc, "/ready")
	s.wait(t, "a ready model again", ready(true))

	// A crash of the worker takes only itself along.
	post(t, alloc, "/crash")
	s.waitEvent(t, allocID, "m", "Terminated", "worker ended by signal 11 (segmentation fault)")
	s.wait(t, "a ready model after the crash", func() bool {
		a := s.reported[allocID]
		return a.TaskStates["m"].Restarts == 1 && a.Serving != nil && a.Serving.Ready
	})

	s.halt(allocID)
	got := s.waitStatus(t, allocID, cluster.AllocClientComplete)
	if got.Serving != nil {
		t.Errorf("an ended allocation serves %+v", got.Serving)
	}
	if !hasEvent(got, "m", "Killing", "Sent SIGTERM") {
		t.Errorf("events %s", kinds(got, "m"))
	}
}

// TestStateThatKnowsLess restores the servers to a moment at which the model was
// not ready yet: what they had acknowledged is told again.
func TestStateThatKnowsLess(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, onnxTask("m", s.model("a model")))
	alloc.DeploymentID = "d"
	j.TaskGroups[0].Update = &cluster.UpdateStrategy{HealthCheck: "task_states", MinHealthyTime: time.Millisecond, HealthyDeadline: time.Hour}
	s.run(j, alloc)
	told := func() bool {
		a := s.reported[allocID]
		return a != nil && a.Serving != nil && a.Serving.Ready && a.DeploymentStatus != nil
	}
	s.wait(t, "a healthy model", told)
	s.change(func() { delete(s.reported, allocID) })
	s.edit(allocID, func(a *cluster.Allocation) {
		a.ClientStatus, a.Serving = cluster.AllocClientRunning, &cluster.Serving{Task: "m", Model: "m", Version: 3, Address: address(alloc)}
	})
	s.wait(t, "a healthy model once more", told)
}

func TestModelThatCrashesAtOnce(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, onnxTask("m", s.model("crash")))
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	if !hasEvent(got, "m", "Terminated", "Exit Code: 139, Signal: 11, Exit Message: \"worker ended by signal 11 (segmentation fault)\"") {
		t.Errorf("events %+v", got.TaskStates["m"].Events)
	}
}

func TestMemoryLimit(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	if why := a.nodeRecord().Attributes["rx.limits.reason"]; why != "" {
		t.Skip("nothing limits tasks here, run as root on a host with unified cgroups: " + why)
	}
	j, alloc := service(t, shell("t", `x=$(head -c 600000000 /dev/zero | tr '\0' x)`))
	s.run(j, alloc)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	if !hasEvent(got, "t", "Terminated", `Exit Message: "task was killed for exceeding its memory limit"`) {
		t.Errorf("events %+v", got.TaskStates["t"].Events)
	}
}

func TestCheckModelCall(t *testing.T) {
	s := newFleetServer(t)
	startAgent(t, testConfig(t, s))
	s.wait(t, "the node", func() bool { return s.out != nil })
	check := func(ref *cluster.ModelRef) ([]byte, error) {
		b, _, err := s.ask(t, &pb.Call{Request: &pb.Call_CheckModel{CheckModel: &pb.CheckModelRequest{Digest: ref.Digest, Size: ref.Size}}})
		return b, err
	}
	b, err := check(s.model("good"))
	if err != nil {
		t.Fatal(err)
	}
	v := new(cluster.ModelVersion)
	if err := cluster.Unmarshal(b, v); err != nil || v.Platform != "onnxruntime_onnx" || v.Inputs[0].Name != "x" {
		t.Errorf("%+v, %v", v, err)
	}
	if _, err := check(s.model("refuse:the file is cut short")); err == nil || err.Error() != "the file is cut short" || cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("error %v", err)
	}
}

func TestTasksRunOnWithoutServers(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	j, alloc := service(t, shell("t", `echo up; exec sleep 600`))
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientRunning)
	pid := a.runner(allocID).tasks["t"].running().State().Identity.TaskPID

	s.mu.Lock()
	s.mute = true // what is said now is lost
	s.mu.Unlock()
	s.stop()
	waitFor(t, "the agent to notice", func() bool { return !a.isConnected() })
	// What happens meanwhile is told later.
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the task to end", func() bool { return a.runner(allocID).isDone() })
	if a.updates.waiting() != 1 {
		t.Errorf("%d updates wait, want 1", a.updates.waiting())
	}
	s.mu.Lock()
	s.mute = false
	s.mu.Unlock()
	s.listen(t, s.address)
	got := s.waitStatus(t, allocID, cluster.AllocClientFailed)
	if !hasEvent(got, "t", "Terminated", "Exit Code: 137, Signal: 9") {
		t.Errorf("events %+v", got.TaskStates["t"].Events)
	}
	waitFor(t, "the acknowledgement", func() bool { return a.updates.waiting() == 0 })
}

func TestWhatIsNotAcknowledgedIsSentAgain(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	s.mu.Lock()
	s.mute = true
	s.mu.Unlock()
	j, alloc := service(t, shell("t", `exec sleep 600`))
	s.run(j, alloc)
	s.wait(t, "lost batches", func() bool { return s.batches > 0 })
	waitFor(t, "the task", func() bool { return a.runner(allocID) != nil && a.runner(allocID).tasks["t"].running() != nil })
	s.change(func() { s.mute = false; s.hangUp() })
	s.waitStatus(t, allocID, cluster.AllocClientRunning)
}

func TestEpochNeverGoesBack(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, shell("t", `exec sleep 600`))
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientRunning)
	s.edit(allocID, func(a *cluster.Allocation) { a.Epoch, a.DesiredStatus = 9, cluster.AllocDesiredStop })
	s.edit(allocID, func(a *cluster.Allocation) { a.Epoch, a.DesiredStatus = 12, cluster.AllocDesiredRun })
	s.wait(t, "the newer epoch", func() bool { return s.reported[allocID].Epoch == 12 })
	if got := s.alloc(allocID); got.ClientStatus != cluster.AllocClientRunning || hasEvent(got, "t", "Killing", "") {
		t.Errorf("an order of an older epoch was followed: %s", kinds(got, "t"))
	}
}

func TestAllocationThatIsOverIsNotRun(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	j, done := service(t, shell("t", `exec sleep 600`))
	done.ID, done.ClientStatus = "22222222-67e5-efac-7b92-e754dc4a5431", cluster.AllocClientFailed
	_, stopped := service(t, j.TaskGroups[0].Tasks[0])
	stopped.ID, stopped.DesiredStatus = "33333333-67e5-efac-7b92-e754dc4a5431", cluster.AllocDesiredStop
	s.run(j, done)
	s.run(j, stopped)
	s.waitStatus(t, stopped.ID, cluster.AllocClientComplete)
	if a.runner(done.ID) != nil || a.runner(stopped.ID) != nil {
		t.Error("an allocation that was over is run")
	}
}

// TestNothingRunsBesideWhatIsLost: the servers gave up what runs here while the
// node was silent, and gave its place to another, which begins when it has ended.
func TestNothingRunsBesideWhatIsLost(t *testing.T) {
	for _, how := range []string{"lost", "forgotten"} {
		t.Run(how, func(t *testing.T) {
			s := newFleetServer(t)
			halting(t, s, startAgent(t, testConfig(t, s)))
			held := filepath.Join(t.TempDir(), "held")
			// mkdir fails where another still holds the device.
			script := `mkdir "` + held + `" || exit 9; trap 'sleep 0.5; rmdir "` + held + `"; exit 0' INT; while :; do sleep 0.05; done`
			j, old := service(t, shell("t", script))
			s.run(j, old)
			s.waitStatus(t, old.ID, cluster.AllocClientRunning)
			waitFor(t, "the device to be held", func() bool { _, err := os.Stat(held); return err == nil })

			heir := *old
			heir.ID, heir.Epoch = "22222222-67e5-efac-7b92-e754dc4a5431", 20
			s.change(func() { // while the node is away
				s.hangUp()
				if lost := *old; how == "lost" {
					lost.DesiredStatus, lost.ClientStatus, lost.AllocModifyIndex = cluster.AllocDesiredStop, cluster.AllocClientLost, 20
					s.allocs[old.ID] = &lost
				} else {
					delete(s.allocs, old.ID)
				}
				s.allocs[heir.ID] = &heir
			})
			s.wait(t, "the heir to run", func() bool {
				r := s.reported[heir.ID]
				return r != nil && r.ClientStatus != cluster.AllocClientPending
			})
			if got := s.waitStatus(t, heir.ID, cluster.AllocClientRunning); got.TaskStates["t"].Restarts != 0 {
				t.Errorf("the heir needed %d restarts", got.TaskStates["t"].Restarts)
			}
		})
	}
}

// TestWaitsForWhatItNeedsOnly: work that was given what something overdue still uses
// waits for its end and says so, also through a restart of the agent; other work begins.
func TestWaitsForWhatItNeedsOnly(t *testing.T) {
	const heirID, otherID, lostID = "11111111-67e5-efac-7b92-e754dc4a5431", "22222222-67e5-efac-7b92-e754dc4a5431", "99999999-67e5-efac-7b92-e754dc4a5431"
	for _, what := range []string{"device GPU-1", "memory", "cpu"} {
		t.Run(what, func(t *testing.T) {
			s := newFleetServer(t)
			cfg := testConfig(t, s)
			cfg.GPUs = gpu.NewFake(exampleGPUs())
			a := startAgent(t, cfg)
			dir := t.TempDir()
			held, release := filepath.Join(dir, "held"), filepath.Join(dir, "release")
			j, lost := service(t, shell("t", `mkdir "`+held+`" || exit 9; trap 'while [ ! -e "`+release+`" ]; do sleep 0.02; done; rmdir "`+held+`"; exit 0' INT; while :; do sleep 0.02; done`))
			lost.ID = lostID
			given := func(a *cluster.Allocation, device string, memory, cpu int64) *cluster.Allocation {
				a = cluster.Clone(a)
				a.AllocatedResources.Shared.Ports = nil
				a.AllocatedResources.Tasks["t"] = &cluster.AllocatedTaskResources{
					Cpu: cluster.AllocatedCPU{CpuShares: cpu}, Memory: cluster.AllocatedMemory{MemoryMB: memory},
					Devices: []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", Name: "NVIDIA H100 80GB HBM3", DeviceIDs: []string{device}}},
				}
				return a
			}
			all := a.nodeRecord().NodeResources
			switch what {
			case "memory":
				lost = given(lost, "GPU-1", all.Memory.MemoryMB, 0)
			case "cpu":
				lost = given(lost, "GPU-1", 0, all.Cpu.CpuShares)
			default:
				lost = given(lost, "GPU-1", 1, 1)
			}
			s.run(j, lost)
			s.waitStatus(t, lostID, cluster.AllocClientRunning)
			waitFor(t, "the device to be held", func() bool { _, err := os.Stat(held); return err == nil })

			heir, other := given(lost, "GPU-0", 1, 1), given(lost, "GPU-0", 0, 0)
			if what == "device GPU-1" {
				heir = given(lost, "GPU-1", 1, 1)
			} else {
				other.AllocatedResources.Tasks["t"].Devices = nil
			}
			heir.ID, heir.Epoch = heirID, 20
			other.ID, other.Epoch, other.JobID = otherID, 20, "other"
			k := cluster.Clone(j)
			k.ID, k.Name = "other", "other"
			k.TaskGroups[0].Tasks[0] = shell("t", "exec sleep 600")
			s.want(func() {
				gone := cluster.Clone(lost)
				gone.DesiredStatus, gone.ClientStatus, gone.AllocModifyIndex = cluster.AllocDesiredStop, cluster.AllocClientLost, 20
				s.allocs[lostID] = gone
				s.jobs["other"], s.allocs[otherID], s.allocs[heirID] = k, other, heir
			})
			s.waitStatus(t, otherID, cluster.AllocClientRunning)
			waits := func(times int) {
				t.Helper()
				s.wait(t, "the heir to say that it waits", func() bool {
					r, n := s.reported[heirID], 0
					if r == nil || r.TaskStates["t"] == nil {
						return false
					}
					for _, e := range r.TaskStates["t"].Events {
						if e.Type == "Task Setup" && strings.HasSuffix(e.DisplayMessage, "allocation "+lostID+" of job web, which still uses "+what) {
							n++
						}
					}
					return n == times && r.ClientStatus == cluster.AllocClientPending
				})
			}
			waits(1)
			a.stop()
			cfg.GPUs = gpu.NewFake(exampleGPUs())
			a = startAgent(t, cfg)
			halting(t, s, a)
			waits(2)
			if err := os.WriteFile(release, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			s.wait(t, "the heir to run", func() bool { return s.reported[heirID].ClientStatus != cluster.AllocClientPending })
			s.waitStatus(t, heirID, cluster.AllocClientRunning)
		})
	}
}

// TestWaitHasAnEnd: what was given a device that is not set free fails, to be placed
// elsewhere, and never runs beside its user; and what is stopped while it waits ends.
func TestWaitHasAnEnd(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, first := service(t, shell("t", `exec sleep 600`))
	j.TaskGroups[0].Tasks[0].KillTimeout = time.Millisecond
	s.run(j, first)
	s.waitStatus(t, first.ID, cluster.AllocClientRunning)
	second, third := *first, *first // with the same port
	second.ID, third.ID = "22222222-67e5-efac-7b92-e754dc4a5431", "33333333-67e5-efac-7b92-e754dc4a5431"
	s.run(j, &second)
	s.run(j, &third)
	s.wait(t, "both to wait", func() bool {
		return hasEvent(s.reported[second.ID], "t", "Task Setup", "still uses port") && hasEvent(s.reported[third.ID], "t", "Task Setup", "still uses port")
	})
	s.halt(third.ID)
	if got := s.waitStatus(t, third.ID, cluster.AllocClientComplete); hasEvent(got, "t", "Started", "") {
		t.Errorf("what was stopped while it waited began: %s", kinds(got, "t"))
	}
	if got := s.waitStatus(t, second.ID, cluster.AllocClientFailed); !hasEvent(got, "t", "Setup Failure", "in vain for the end of allocation "+first.ID) || hasEvent(got, "t", "Started", "") {
		t.Errorf("what was given a port in use has events %s", kinds(got, "t"))
	}
	if got := s.alloc(first.ID); got.ClientStatus != cluster.AllocClientRunning {
		t.Errorf("the first is %s", got.ClientStatus)
	}
}

func TestRefusals(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	a := startAgent(t, cfg)
	cfg.HTTPAddr = "none"
	if _, err := New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "another agent runs") {
		t.Errorf("a second agent: %v", err)
	}
	cfg.DataDir, cfg.HTTPAddr = t.TempDir(), a.HTTPAddr()
	if _, err := New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), a.HTTPAddr()) {
		t.Errorf("a port that is taken: %v", err)
	}
	if _, err := New(t.Context(), Config{Address: "x"}); err == nil ||
		!strings.Contains(err.Error(), "DataDir") || !strings.Contains(err.Error(), "Servers") || !strings.Contains(err.Error(), `"x"`) {
		t.Errorf("an empty configuration: %v", err)
	}
}

func TestHTTP(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	s.wait(t, "the node", func() bool { return s.out != nil })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) string {
		resp, err := client.Get("http://" + a.HTTPAddr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status, err)
		}
		return string(b)
	}
	waitFor(t, "the connection in the metrics", func() bool { return strings.Contains(get("/metrics"), "rxvision_agent_connected 1") })
	for _, want := range []string{`rxvision_agent_allocations{status="running"} 0`, "rxvision_blob_cache_limit_bytes"} {
		if !strings.Contains(get("/metrics"), want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	if got := get("/health"); !strings.Contains(got, `"ok":true`) {
		t.Errorf("/health %s", got)
	}
}

func TestGarbage(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	cfg.KeepAllocs = 1
	a := startAgent(t, cfg)
	halting(t, s, a)
	for i := range 3 {
		j, alloc := service(t, shell("t", "true"))
		j.Type, alloc.ID = cluster.JobTypeBatch, fmt.Sprintf("%08d-67e5-efac-7b92-e754dc4a5431", i)
		s.run(j, alloc)
		s.waitStatus(t, alloc.ID, cluster.AllocClientComplete)
		waitFor(t, "the end", func() bool { return a.runner(alloc.ID).isDone() })
	}
	a.collectOnce()
	left, err := os.ReadDir(a.allocRoot)
	if err != nil || len(left) != 1 || !strings.HasPrefix(left[0].Name(), "00000002") {
		t.Errorf("left %v, %v", left, err)
	}
	_, _, err = s.ask(t, &pb.Call{Request: &pb.Call_Logs{Logs: &pb.LogsRequest{AllocId: "00000000-67e5-efac-7b92-e754dc4a5431", Task: "t", Type: "stdout"}}})
	if cluster.CodeOf(err) != cluster.CodeNotFound || !strings.Contains(err.Error(), "removed") {
		t.Errorf("logs of a collected allocation: %v", err)
	}
}
