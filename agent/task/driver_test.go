package task

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rxvision/rxvision/blob"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/proc"
)

// node is a set of drivers with a cache that is filled from models.
type node struct {
	*Drivers
	models map[string][]byte // by digest
	fetch  func(d blob.Digest, offset int64) (io.ReadCloser, error)
}

func newNode(t *testing.T) *node {
	t.Helper()
	cache, err := blob.OpenCache(t.TempDir(), 1<<20, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cache.Close() })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{models: map[string][]byte{}}
	n.Drivers = NewDrivers(t.Context(), Options{
		RawExec: true, CgroupParent: testCgroup, Executable: exe, ORTLibrary: exe, WorkerEnv: []string{"VK_ICD_FILENAMES=/x"},
		Cache: cache,
		Fetch: func(_ context.Context, d blob.Digest, offset int64) (io.ReadCloser, error) {
			if n.fetch != nil {
				return n.fetch(d, offset)
			}
			return io.NopCloser(bytes.NewReader(n.models[d.String()][offset:])), nil
		},
	})
	return n
}

// model puts a model into the fleet and returns a reference to it.
func (n *node) model(content string) *cluster.ModelRef {
	d := blob.Sum([]byte(content)).String()
	n.models[d] = []byte(content)
	return &cluster.ModelRef{Name: "m", Version: 7, Digest: d, Size: int64(len(content))}
}

// kept remembers the last state that was kept.
type kept struct {
	mu     sync.Mutex
	states []State
}

func (k *kept) keep(s State) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	b, _ := json.Marshal(s) // as the agent does
	var copied State
	if err := json.Unmarshal(b, &copied); err != nil {
		return err
	}
	k.states = append(k.states, copied)
	return nil
}

func (k *kept) last() State { return k.states[len(k.states)-1] }

// config makes a start of a task; config is its block.
func config(t *testing.T, spec *cluster.Task, block any, k *kept) *Config {
	t.Helper()
	raw, err := json.Marshal(block)
	if err != nil {
		t.Fatal(err)
	}
	spec.Config = raw
	if spec.Name == "" {
		spec.Name = "t"
	}
	e, dir := exampleEnv(t, spec)
	alloc := exampleAlloc(spec.Name)
	alloc.ID = filepath.Base(filepath.Dir(t.TempDir())) + strconv.FormatInt(time.Now().UnixNano(), 36)
	e.set("NOMAD_ALLOC_ID", alloc.ID)
	return &Config{Alloc: alloc, Task: spec, Dir: dir, Env: e, StatusFile: filepath.Join(t.TempDir(), "status"), Keep: k.keep}
}

func start(t *testing.T, n *node, driver string, c *Config) Handle {
	t.Helper()
	d, err := n.Get(driver)
	if err != nil {
		t.Fatal(err)
	}
	h, err := d.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.Stop(context.Background(), syscall.SIGKILL, 0)
		h.Detach()
	})
	return h
}

func ended(t *testing.T, h Handle) Exit {
	t.Helper()
	select {
	case <-h.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the task did not end")
	}
	return h.Exit()
}

func log(t *testing.T, c *Config, stream string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Dir.Logs(), c.Task.Name+"."+stream+".0"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestRawExec(t *testing.T) {
	n, k := newNode(t), &kept{}
	c := config(t, &cluster.Task{}, map[string]any{"command": "sh", "args": []string{"-c", `echo "$NOMAD_TASK_NAME $PWD ${NOMAD_PORT_http_api}"; echo oops >&2; exit 3`}}, k)
	h := start(t, n, DriverRawExec, c)
	if exit := ended(t, h); exit.Code != 3 || exit.Signal != 0 {
		t.Errorf("exit %+v", exit)
	}
	if got, want := log(t, c, "stdout"), "t "+c.Dir.Root()+" 20123\n"; got != want {
		t.Errorf("stdout %q, want %q", got, want)
	}
	if got := log(t, c, "stderr"); got != "oops\n" {
		t.Errorf("stderr %q", got)
	}
	if err := h.Signal(syscall.SIGHUP); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to an ended task: %v", err)
	}
	if len(k.states) != 2 || k.states[0].Identity.PID != 0 || k.last().Identity.PID == 0 {
		t.Errorf("kept %+v", k.states)
	}
}

func TestStartFaults(t *testing.T) {
	n, k := newNode(t), &kept{}
	n.opts.ORTLibrary = ""
	for _, c := range []struct {
		name, driver string
		task         cluster.Task
		block        map[string]any
		fault        string
	}{
		{"no command", DriverRawExec, cluster.Task{}, map[string]any{}, "command is missing"},
		{"no such program", DriverRawExec, cluster.Task{}, map[string]any{"command": "/no/such"}, "no such file"},
		{"unknown key", DriverRawExec, cluster.Task{}, map[string]any{"command": "true", "image": "x"}, "image"},
		{"no such user", DriverRawExec, cluster.Task{User: "nosuchuser"}, map[string]any{"command": "true"}, "nosuchuser"},
		{"no model", DriverONNX, cluster.Task{}, map[string]any{"port": "http-api"}, "no registered model"},
		{"no port", DriverONNX, cluster.Task{Model: n.model("x")}, map[string]any{"port": "grpc"}, `no port "grpc"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := n.Get(c.driver)
			if err != nil {
				t.Fatal(err)
			}
			_, err = d.Start(t.Context(), config(t, &c.task, c.block, k))
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("error %v, want one with %q", err, c.fault)
			}
			if Transient(err) {
				t.Error("a fault of the job counts as passing")
			}
		})
	}
	n.opts.RawExec = false
	d, _ := n.Get(DriverRawExec)
	if info := d.Fingerprint(); info.Detected || !strings.Contains(info.HealthDescription, "disabled") {
		t.Errorf("raw_exec is %+v", info)
	}
	if _, err := d.Start(t.Context(), config(t, &cluster.Task{}, map[string]any{"command": "true"}, k)); err == nil {
		t.Error("a disabled driver started a task")
	}
	if _, err := n.Get("docker"); err == nil || !strings.Contains(err.Error(), "docker") {
		t.Errorf("docker: %v", err)
	}
	d, _ = n.Get(DriverONNX)
	if info := d.Fingerprint(); info.Detected || info.HealthDescription == "" {
		t.Errorf("onnx without a runtime is %+v", info)
	}
}

func TestStopEscalates(t *testing.T) {
	n, k := newNode(t), &kept{}
	block := map[string]any{"command": "sh", "args": []string{"-c", `trap 'echo caught' TERM; echo up; while :; do sleep 0.05; done`}}
	c := config(t, &cluster.Task{}, block, k)
	h := start(t, n, DriverRawExec, c)
	waitFor(t, "the task to be up", func() bool { return strings.Contains(log(t, c, "stdout"), "up") })
	if use, err := h.Usage(); err != nil || use.Processes == 0 || use.RSS == 0 {
		t.Errorf("usage %+v, %v", use, err)
	}
	if err := h.Stop(t.Context(), syscall.SIGTERM, 200*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if exit := h.Exit(); exit.Signal != int(syscall.SIGKILL) {
		t.Errorf("exit %+v", exit)
	}
	if got := log(t, c, "stdout"); !strings.Contains(got, "caught") {
		t.Errorf("the task did not get SIGTERM: %q", got)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestRecover(t *testing.T) {
	n := newNode(t)
	d, _ := n.Get(DriverRawExec)
	sleeper := func(script string) map[string]any {
		return map[string]any{"command": "sh", "args": []string{"-c", script}}
	}
	t.Run("running", func(t *testing.T) {
		k := &kept{}
		h := start(t, n, DriverRawExec, config(t, &cluster.Task{}, sleeper("read x < /dev/null; sleep 600 & wait; exit 4"), k))
		h.Detach()
		again, err := d.Recover(t.Context(), k.last())
		if err != nil {
			t.Fatal(err)
		}
		defer again.Detach()
		if err := again.Stop(t.Context(), syscall.SIGKILL, 0); err != nil {
			t.Fatal(err)
		}
		if exit := ended(t, again); exit.Signal != 9 {
			t.Errorf("exit %+v", exit)
		}
	})
	t.Run("ended meanwhile", func(t *testing.T) {
		k := &kept{}
		h := start(t, n, DriverRawExec, config(t, &cluster.Task{}, sleeper("exit 5"), k))
		ended(t, h)
		again, err := d.Recover(t.Context(), k.last())
		if err != nil {
			t.Fatal(err)
		}
		defer again.Detach()
		if exit := ended(t, again); exit.Code != 5 {
			t.Errorf("exit %+v", exit)
		}
		if _, err := again.Usage(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("usage of an ended task: %v", err)
		}
	})
	t.Run("killed before it kept the identity", func(t *testing.T) {
		k := &kept{}
		start(t, n, DriverRawExec, config(t, &cluster.Task{}, sleeper("sleep 600 & wait"), k))
		want := k.last().Identity
		again, err := d.Recover(t.Context(), k.states[0])
		if err != nil {
			t.Fatal(err)
		}
		defer again.Detach()
		if got := again.State().Identity; got != want {
			t.Errorf("found %+v, want %+v", got, want)
		}
		if err := again.Stop(t.Context(), syscall.SIGKILL, 0); err != nil {
			t.Error(err)
		}
	})
	t.Run("ended before it kept the identity", func(t *testing.T) {
		k := &kept{}
		h := start(t, n, DriverRawExec, config(t, &cluster.Task{}, sleeper("exit 6"), k))
		ended(t, h)
		again, err := d.Recover(t.Context(), k.states[0])
		if err != nil {
			t.Fatal(err)
		}
		defer again.Detach()
		if exit := ended(t, again); exit.Code != 6 {
			t.Errorf("exit %+v", exit)
		}
	})
	t.Run("never started", func(t *testing.T) {
		s := State{Driver: DriverRawExec, AllocID: "no-such-alloc", Task: "t", Identity: proc.Identity{StatusFile: filepath.Join(t.TempDir(), "s")}}
		if _, err := d.Recover(t.Context(), s); !errors.Is(err, ErrNotStarted) {
			t.Errorf("error %v", err)
		}
	})
}

func TestKeepFailureLeavesNothingRunning(t *testing.T) {
	n := newNode(t)
	d, _ := n.Get(DriverRawExec)
	k := &kept{}
	c := config(t, &cluster.Task{}, map[string]any{"command": "sleep", "args": []string{"600"}}, k)
	calls := 0
	c.Keep = func(s State) error {
		if calls++; calls == 2 {
			k.states = append(k.states, s)
			return errors.New("disk full")
		}
		return nil
	}
	_, err := d.Start(t.Context(), c)
	if err == nil || !Transient(err) || !strings.Contains(err.Error(), "disk full") {
		t.Fatalf("error %v", err)
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(k.last().Identity.TaskPID)); !os.IsNotExist(err) {
		t.Errorf("the task still runs: %v", err)
	}
}

func TestExecIsolates(t *testing.T) {
	n, k := newNode(t), &kept{}
	if !n.host.Isolation {
		t.Skip("this host cannot isolate: " + n.host.IsolateReason + " (run the tests as root)")
	}
	hidden := t.TempDir()
	if err := os.WriteFile(filepath.Join(hidden, "key"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.opts.Hidden = []string{hidden}
	script := `id -un; ls ` + hidden + ` | wc -l; echo ok > $NOMAD_TASK_DIR/f && echo wrote; echo s > $NOMAD_SECRETS_DIR/f && echo secret; (echo x > /etc/rxvision-test) 2>/dev/null || echo read-only; echo $HOME; echo > $TMPDIR/x && echo tmp`
	spec := &cluster.Task{Driver: DriverExec}
	c := config(t, spec, map[string]any{"command": "sh", "args": []string{"-c", script}}, k)
	if err := c.Dir.Build(User(spec)); err != nil {
		t.Fatal(err)
	}
	h := start(t, n, DriverExec, c)
	if exit := ended(t, h); exit.Code != 0 {
		t.Errorf("exit %+v, stderr %q", exit, log(t, c, "stderr"))
	}
	if got, want := log(t, c, "stdout"), "nobody\n0\nwrote\nsecret\nread-only\n"+c.Dir.Root()+"\ntmp\n"; got != want {
		t.Errorf("stdout %q, want %q; stderr %q", got, want, log(t, c, "stderr"))
	}
	d, _ := n.Get(DriverExec)
	if _, err := d.Start(t.Context(), config(t, &cluster.Task{User: "root"}, map[string]any{"command": "true"}, k)); err == nil || !strings.Contains(err.Error(), "root") {
		t.Errorf("exec as root: %v", err)
	}
}

// freePort finds a port that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func TestONNX(t *testing.T) {
	n, k := newNode(t), &kept{}
	spec := &cluster.Task{Driver: DriverONNX, Model: n.model("a model"), Env: map[string]string{"LD_PRELOAD": "/evil.so", "RXVISION_ORT_LIBRARY": "/evil.so", "MINE": "1"}}
	c := config(t, spec, map[string]any{"model": "m@production", "port": "serve", "threads": 2}, k)
	port := freePort(t)
	c.Alloc.AllocatedResources.Shared.Ports = []cluster.PortMapping{{Label: "serve", Value: port, HostIP: "127.0.0.1"}}
	var notices []string
	c.Notice = func(text string) { notices = append(notices, text) }
	h := start(t, n, DriverONNX, c)
	address := h.State().Address
	if want := "127.0.0.1:" + strconv.Itoa(port); address != want {
		t.Fatalf("address %q, want %q", address, want)
	}
	var self struct{ Args, Env []string }
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	waitFor(t, "the worker", func() bool {
		resp, err := client.Get("http://" + address + "/self")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return json.NewDecoder(resp.Body).Decode(&self) == nil
	})
	for flag, want := range map[string]string{"-model": "m", "-version": "7", "-listen": address, "-threads": "2"} {
		if got := flagValue(self.Args, flag); got != want {
			t.Errorf("%s %q, want %q", flag, got, want)
		}
	}
	if got, _ := os.ReadFile(flagValue(self.Args, "-file")); string(got) != "a model" {
		t.Errorf("model file holds %q", got)
	}
	for _, want := range []string{"ORT_DISABLE_TELEMETRY=1", "RXVISION_ORT_LIBRARY=" + n.opts.ORTLibrary, "MINE=1", "VK_ICD_FILENAMES=/x", "CUDA_VISIBLE_DEVICES=-1"} {
		if !slices.Contains(self.Env, want) {
			t.Errorf("the worker's environment lacks %s", want)
		}
	}
	if i := slices.IndexFunc(self.Env, func(kv string) bool { return strings.Contains(kv, "evil") }); i >= 0 {
		t.Errorf("the job set %s", self.Env[i])
	}
	if len(notices) == 0 {
		t.Error("the fetch was not told")
	}

	// It serves on while nobody watches, and is taken over with its artifact held.
	h.Detach()
	d, _ := n.Get(DriverONNX)
	again, err := d.Recover(t.Context(), k.last())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Stop(t.Context(), syscall.SIGTERM, time.Second); err != nil {
		t.Fatal(err)
	}
	again.Detach()
}

func TestONNXFetchIsTriedAgain(t *testing.T) {
	n, k := newNode(t), &kept{}
	ref := n.model("a model that comes in pieces")
	content, times := n.models[ref.Digest], 0
	n.fetch = func(_ blob.Digest, offset int64) (io.ReadCloser, error) {
		if times++; times == 1 {
			return io.NopCloser(io.MultiReader(bytes.NewReader(content[:10]), broken{})), nil
		}
		if offset != 10 {
			t.Errorf("resumed at %d, not 10", offset)
		}
		return io.NopCloser(bytes.NewReader(content[offset:])), nil
	}
	c := config(t, &cluster.Task{Driver: DriverONNX, Model: ref}, map[string]any{"model": "m", "port": "http-api"}, k)
	c.Alloc.AllocatedResources.Shared.Ports[0].Value = freePort(t)
	start(t, n, DriverONNX, c)

	n.fetch = func(blob.Digest, int64) (io.ReadCloser, error) { return nil, errors.New("no server") }
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	d, _ := n.Get(DriverONNX)
	c = config(t, &cluster.Task{Driver: DriverONNX, Model: n.model("another")}, map[string]any{"model": "m", "port": "http-api"}, k)
	if _, err := d.Start(ctx, c); err == nil || !Transient(err) || !strings.Contains(err.Error(), "no server") {
		t.Errorf("error %v", err)
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("connection lost") }

func TestCheckModel(t *testing.T) {
	n := newNode(t)
	good := n.model("good")
	v, err := n.CheckModel(t.Context(), good.Digest, good.Size)
	if err != nil {
		t.Fatal(err)
	}
	if v.Platform != "onnxruntime_onnx" || v.Digest != good.Digest || v.Size != 4 || len(v.Inputs) != 1 ||
		v.Inputs[0].Name != "x" || v.Inputs[0].Datatype != "FP32" || !slices.Equal(v.Inputs[0].Shape, []int64{-1, 4}) || v.Properties["labels"] != "a,b" {
		t.Errorf("got %+v", v)
	}
	for content, want := range map[string]string{
		"refuse:the file is no ONNX model": "the file is no ONNX model",
		"flood":                            "more than",
		"garble":                           "not JSON",
	} {
		ref := n.model(content)
		_, err := n.CheckModel(t.Context(), ref.Digest, ref.Size)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", content, err, want)
		}
		if content != "garble" && cluster.CodeOf(err) != cluster.CodeInvalid {
			t.Errorf("%s: code %s", content, cluster.CodeOf(err))
		}
	}
}

// A model that nobody has looked at yet is loaded by nobody.
func TestCheckModelIsIsolated(t *testing.T) {
	n := newNode(t)
	if !n.host.Isolation {
		t.Skip("this host cannot isolate: " + n.host.IsolateReason + " (run the tests as root)")
	}
	dir := t.TempDir()
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(n.opts.Executable)
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "worker")
	if err := os.WriteFile(exe, program, 0o755); err != nil {
		t.Fatal(err)
	}
	cache, err := blob.OpenCache(filepath.Join(dir, "cache"), 1<<20, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	n.opts.Executable, n.opts.ORTLibrary, n.opts.Cache, n.opts.Hidden = exe, exe, cache, []string{dir}
	ref := n.model("who")
	if _, err := n.CheckModel(t.Context(), ref.Digest, ref.Size); err == nil || !strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("checked as %v", err)
	}
	if err := os.Chmod(exe, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.CheckModel(t.Context(), ref.Digest, ref.Size); err == nil || !strings.Contains(err.Error(), fmt.Sprint("uid ", os.Getuid())) {
		t.Errorf("checked as %v", err)
	}
}

func TestFingerprints(t *testing.T) {
	n := newNode(t)
	infos, attrs := n.Fingerprints()
	for _, name := range []string{DriverRawExec, DriverExec, DriverONNX} {
		info := infos[name]
		if info == nil || info.HealthDescription == "" {
			t.Errorf("%s: %+v", name, info)
			continue
		}
		if info.Detected != (attrs["driver."+name] == "1") {
			t.Errorf("%s: detected %v, attributes %v", name, info.Detected, attrs)
		}
	}
	for _, name := range []string{"rx.reattach", "rx.limits", "rx.isolation"} {
		if v := attrs[name]; v != "true" && (v != "false" || attrs[name+".reason"] == "") {
			t.Errorf("%s is %q, reason %q", name, v, attrs[name+".reason"])
		}
	}
}
