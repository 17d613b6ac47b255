package e2e

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// fakeGPUs builds the stand-in for NVIDIA's library and gives dev's flags and
// environment for a node with two GPUs.
func fakeGPUs(t *testing.T) (flags, env []string) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc to build the fake NVML library with: apt-get install gcc")
	}
	dir := t.TempDir()
	lib := filepath.Join(dir, "libnvidia-ml.so.1")
	if out, err := exec.Command(gcc, "-shared", "-fPIC", "-o", lib, filepath.Join(root, "agent/gpu/testdata/fake_nvml.c")).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	script := write(t, "gpus", `driver 550.54.15
cuda 12040
count 2
0.uuid GPU-aaaaaaaa-0000-0000-0000-000000000000
0.name NVIDIA H100 80GB HBM3
0.mem 81559
0.used 1024
0.bar1 131072
0.pci 00000000:0A:00.0
0.temp 41
0.gpu 17
1.uuid GPU-bbbbbbbb-0000-0000-0000-000000000000
1.name NVIDIA H100 80GB HBM3
1.mem 81559
1.used 2048
1.bar1 131072
1.pci 00000000:0B:00.0
1.temp 42
1.gpu 0
`)
	return []string{"--nvml-library", lib}, []string{"RX_FAKE_NVML=" + script}
}

// TestNomadCommandLine drives the unmodified nomad through the commands of a
// user's day and reads what it prints.
func TestNomadCommandLine(t *testing.T) {
	nomadBinary(t)
	flags, env := fakeGPUs(t)
	p := newPlatform(t, flags...)
	p.env = env
	p.start()

	p.nomad(0, "server", "members").matches(t, `alive\s+true\s+3\s`)
	p.nomad(0, "operator", "raft", "list-peers").matches(t, `leader\s+true`)
	p.nomad(0, "agent-info").has(t, "raft", "applied_index", "state = Leader", "leader = true")
	p.nomad(0, "status").has(t, "No running jobs")
	p.nomad(0, "eval", "list").has(t, "No evals found")
	p.nomad(0, "deployment", "list").has(t, "No deployments found")

	// The model must be there before a job may name it.
	p.nomad(1, "job", "run", "jobs/examples/fashion.nomad.hcl").has(t, `unknown model "fashion"`, "task.serve.config.model")
	p.rxvision(0, "model", "push", "fashion", "models/fashion/fashion.onnx").has(t, "version 1")

	p.nomad(0, "job", "validate", "jobs/examples/fashion.nomad.hcl").has(t, "Job validation successful")
	p.nomad(1, "job", "plan", "jobs/examples/fashion.nomad.hcl").has(t, `+ Job: "fashion"`, "(1 create)", "All tasks successfully allocated")
	p.nomad(0, "job", "run", "jobs/examples/fashion.nomad.hcl").has(t, `finished with status "complete"`, "Deployment", "successful")
	p.nomad(0, "job", "plan", "jobs/examples/fashion.nomad.hcl").has(t, "(1 ignore)")
	p.nomad(0, "job", "status").matches(t, `^fashion\s+service\s+50\s+running`)
	p.nomad(0, "status").matches(t, `^fashion\s+service\s+50\s+running`)
	status := p.nomad(0, "job", "status", "fashion")
	status.matches(t, `Status\s+= running`, `^serve\s+0\s+0\s+1\s+0\s+0\s+0\s+0`, `Status\s+= successful`, `serve\s+0\s+run\s+running`)
	p.nomad(0, "job", "inspect", "fashion").has(t, `"ID": "fashion"`, `"Driver": "onnx"`, `"Config": {`)
	p.nomad(0, "job", "inspect", "-hcl", "fashion").has(t, `job "fashion"`)

	var allocs []struct{ ID, EvalID, NodeID string }
	p.get("/v1/job/fashion/allocations", &allocs)
	if len(allocs) != 1 {
		t.Fatalf("%d allocations", len(allocs))
	}
	id := allocs[0].ID
	p.nomad(0, "alloc", "status", id[:8]).has(t, "Started", "Task started", "serve", "Allocation Addresses", "http")
	p.nomad(0, "alloc", "status", "-verbose", id).has(t, "Placement Metrics", allocs[0].NodeID)
	p.nomad(0, "status", id[:8]).has(t, "Allocation", id[:8])
	p.nomad(0, "eval", "list").matches(t, `job-register\s+fashion\s+default\s+<none>\s+complete\s+false`)
	p.nomad(0, "eval", "status", allocs[0].EvalID[:8]).has(t, "complete", "job-register")
	deployments := p.nomad(0, "deployment", "list")
	deployments.matches(t, `fashion\s+0\s+successful`)
	var ds []struct{ ID string }
	p.get("/v1/deployments", &ds)
	p.nomad(0, "deployment", "status", ds[0].ID[:8]).has(t, "successful", "Deployed", "serve")

	// The same with a service, whose check the deployment waits for.
	text, err := os.ReadFile(filepath.Join(root, "jobs/examples/fashion.nomad.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	service := `
    service {
      name     = "model"
      provider = "nomad"
      port     = "http"
      check {
        name     = "ready"
        type     = "http"
        path     = "/v2/health/ready"
        interval = "1s"
        timeout  = "5s"
      }
    }
    update {`
	file := filepath.Join(t.TempDir(), "checked.nomad.hcl")
	edited := strings.Replace(strings.Replace(string(text), `job "fashion"`, `job "checked"`, 1), "\n    update {", service, 1)
	if err := os.WriteFile(file, []byte(edited), 0o644); err != nil {
		t.Fatal(err)
	}
	p.nomad(0, "job", "run", file).has(t, "successful")
	p.nomad(0, "service", "list").matches(t, `model\s+\[\]`)
	var served []struct{ ID string }
	p.get("/v1/job/checked/allocations", &served)
	p.nomad(0, "service", "info", "model").matches(t, `checked\s+127\.0\.0\.1:\d+\s+\[\]\s+\S+\s+`+served[0].ID[:8])
	p.nomad(0, "alloc", "checks", served[0].ID).has(t, "ready", "success", "nomad: http ok")
	p.nomad(0, "job", "stop", "-purge", "checked")
	p.nomad(0, "service", "list").has(t, "No service registrations found")

	// Devices with attributes and statistics.
	p.nomad(0, "node", "status").matches(t, `eligible\s+ready`)
	node := p.nomad(0, "node", "status", "-verbose", "-stats", allocs[0].NodeID)
	node.has(t, "nvidia/gpu/NVIDIA H100 80GB HBM3", "GPU-aaaaaaaa", "GPU-bbbbbbbb", "Device Group Attributes", "driver_version", "550.54.15", "81559 MiB",
		"onnx", "raw_exec", "Host Resource Utilization")
	node.matches(t, `Memory state\s+= 1024 / 81559 MiB`)

	// Logs.
	p.nomad(0, "job", "run", "jobs/examples/hello.nomad.hcl").has(t, `finished with status "complete"`)
	p.await("hello has ended", func() bool { return strings.Contains(p.nomad(0, "job", "status", "hello").text, "complete") })
	var hello []struct{ ID string }
	p.get("/v1/job/hello/allocations", &hello)
	p.nomad(0, "alloc", "logs", hello[0].ID[:8]).has(t, "hello", hello[0].ID)
	p.nomad(0, "alloc", "logs", "-stderr", id[:8]).has(t, "model")
	p.nomad(0, "alloc", "fs", hello[0].ID[:8], "alloc/logs/").has(t, "stdout.0")
	follow(t, p)

	// Four shares of one GPU: each is told its own, and that nothing holds it to that.
	p.nomad(0, "job", "run", "jobs/examples/share.nomad.hcl").has(t, "a share of a GPU is counted", `finished with status "complete"`)
	p.await("the shares have ended", func() bool {
		return regexp.MustCompile(`share\s+0\s+0\s+0\s+0\s+4\s`).MatchString(p.nomad(0, "job", "status", "share").text)
	})
	var shares []struct{ ID string }
	p.get("/v1/job/share/allocations", &shares)
	told := map[string]bool{}
	for _, a := range shares {
		text := p.nomad(0, "alloc", "logs", a.ID[:8]).text
		told[text] = true
		if !strings.Contains(text, "GPU GPU-") || !strings.Contains(text, ", 250 thousandths, 2048 MiB") {
			t.Errorf("a task with a share of a GPU was told %q", text)
		}
	}
	if len(shares) != 4 || len(told) != 1 {
		t.Errorf("four shares that fit on one GPU were given %d different ones to %d tasks", len(told), len(shares))
	}

	// A GPU task sees its own device only, in its environment and in the accounts.
	p.nomad(0, "job", "run", write(t, "gpu.nomad.hcl", gpuJob("g1", 1)))
	p.nomad(0, "job", "run", write(t, "gpu.nomad.hcl", gpuJob("g2", 1)))
	seen := map[string]bool{}
	for _, job := range []string{"g1", "g2"} {
		p.await(job+" printed its devices", func() bool { return strings.Contains(p.nomad(0, "alloc", "logs", "-job", job).text, "GPU-") })
		text := p.nomad(0, "alloc", "logs", "-job", job).text
		seen[strings.TrimSpace(text)] = true
	}
	if len(seen) != 2 || !seen["devices=GPU-aaaaaaaa-0000-0000-0000-000000000000"] || !seen["devices=GPU-bbbbbbbb-0000-0000-0000-000000000000"] {
		t.Errorf("two tasks of one GPU each saw %v", seen)
	}
	p.nomad(1, "job", "plan", write(t, "gpu.nomad.hcl", gpuJob("g3", 1))).has(t, "WARNING: Failed to place all allocations", `Dimension "devices: no devices match request" exhausted on 1 nodes`)
	p.nomad(0, "job", "run", "-detach", write(t, "gpu.nomad.hcl", gpuJob("g3", 1)))
	p.await("g3 waits", func() bool { return strings.Contains(p.nomad(0, "job", "status", "g3").text, "Placement Failure") })
	p.nomad(0, "job", "stop", "-purge", "g1").has(t, `finished with status "complete"`)
	p.await("the freed GPU goes to the job that waits", func() bool { return strings.Contains(p.nomad(0, "job", "status", "g3").text, "running") })

	// History, plan of a change, an update in place of the old version, revert.
	src, err := os.ReadFile(filepath.Join(root, "jobs/examples/fashion.nomad.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	changed := write(t, "fashion.nomad.hcl", strings.Replace(string(src), "count = 1", "count = 2", 1))
	p.nomad(1, "job", "plan", changed).has(t, `"1" => "2"`, "(1 create")
	p.nomad(0, "job", "run", changed).has(t, "successful")
	p.nomad(0, "job", "history", "-p", "fashion").has(t, "Version     = 1", "Version     = 0", "Stable      = true", `Count: "1" => "2"`)
	p.nomad(0, "job", "revert", "fashion", "0").has(t, `finished with status "complete"`)

	// Snapshot.
	snap := filepath.Join(t.TempDir(), "state.snap")
	p.nomad(0, "operator", "snapshot", "save", snap).has(t, "State file written")
	p.nomad(0, "operator", "snapshot", "inspect", snap).has(t, "Job", "Alloc", "Index")
	p.nomad(0, "job", "stop", "-purge", "hello")
	p.nomad(0, "operator", "snapshot", "restore", snap).has(t, "Snapshot Restored")
	p.nomad(0, "job", "status").has(t, "hello", "fashion")
	p.rxvision(0, "model", "list").has(t, "fashion")
	p.await("the model answers after the restore", func() bool {
		return p.command(binary, "infer", "fashion", filepath.Join(root, "testdata/fashion/0000-9.png")).code == 0
	})

	p.nomad(0, "job", "stop", "fashion").has(t, `finished with status "complete"`)
	p.nomad(0, "job", "status", "fashion").matches(t, `Status\s+= dead`)
	p.await("the gateway says that nothing serves the model", func() bool {
		r := p.command(binary, "infer", "fashion", filepath.Join(root, "testdata/fashion/0000-9.png"))
		return r.code == 1 && strings.Contains(r.text, "no job serves it")
	})

	// What is not built says so.
	p.nomad(1, "acl", "bootstrap").has(t, "ACL support disabled")
	p.nomad(1, "var", "put", "secret", "key=value").has(t, "501")
}

func gpuJob(name string, count int) string {
	return fmt.Sprintf(`
job %q {
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", "echo devices=$NVIDIA_VISIBLE_DEVICES; exec sleep 1000"]
      }
      resources {
        cpu    = 50
        memory = 16
        device "nvidia/gpu" { count = %d }
      }
    }
    update { min_healthy_time = "100ms" }
  }
}`, name, count)
}

// follow reads a growing log through `nomad alloc logs -f`.
func follow(t *testing.T, p *platform) {
	p.nomad(0, "job", "run", write(t, "ticker.nomad.hcl", `
job "ticker" {
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sh"
        args    = ["-c", "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.1; done"]
      }
      resources {
        cpu    = 50
        memory = 16
      }
    }
    update { min_healthy_time = "100ms" }
  }
}`))
	out := &output{}
	cmd := exec.Command(nomadBinary(t), "alloc", "logs", "-f", "-job", "ticker")
	cmd.Env = append(os.Environ(), "NOMAD_ADDR="+p.http())
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	p.await("a followed log grows", func() bool { return strings.Count(out.String(), "tick ") > 15 })
	lines := strings.Split(out.String(), "\n")
	first := 0
	if _, err := fmt.Sscanf(lines[0], "tick %d", &first); err != nil {
		t.Fatalf("first line %q: %v", lines[0], err)
	}
	for i, l := range lines[:15] { // -f begins at the end; from there no line is missing
		if l != fmt.Sprintf("tick %d", first+i) {
			t.Errorf("line %d is %q after a first of %d", i+1, l, first)
		}
	}
	p.nomad(0, "job", "stop", "-purge", "ticker")
}

// TestInference asks the sample model for all committed test images through the
// gateway, as images and as tensors, and compares with their labels.
func TestInference(t *testing.T) {
	p := newPlatform(t)
	p.start()
	p.serveFashion()
	f, err := os.Open(filepath.Join(root, "testdata/fashion/labels.csv"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	labels := []string{"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"}
	right, asked := 0, 0
	images, err := filepath.Glob(filepath.Join(root, "testdata/fashion/*.png"))
	if err != nil || len(images) < 200 || len(rows) < len(images) {
		t.Fatalf("%d images, %d labels, %v", len(images), len(rows), err)
	}
	for _, path := range images {
		body, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		code, text, err := send("POST", p.gateway()+"/v1/models/fashion/classify?top_k=1", nil, body)
		body.Close()
		var answer struct {
			Classes []struct {
				Label       string
				Probability float64
			}
		}
		if err != nil || code != 200 || json.Unmarshal([]byte(text), &answer) != nil || len(answer.Classes) != 1 {
			t.Fatalf("%s: %d %s %v", path, code, text, err)
		}
		name := strings.TrimSuffix(filepath.Base(path), ".png")
		asked++
		if answer.Classes[0].Label == labels[name[len(name)-1]-'0'] {
			right++
		}
		if c := answer.Classes[0].Probability; c <= 0 || c > 1 {
			t.Errorf("%s: probability %v", path, c)
		}
	}
	if right*100 < 85*asked {
		t.Errorf("%d of %d images right; the model's accuracy on the whole test set is above 0.90", right, asked)
	}
	t.Logf("%d of %d images right", right, asked)

	// The protocol's six calls.
	for path, want := range map[string]string{
		"/v2": "rxvision", "/v2/health/live": "true", "/v2/health/ready": "true",
		"/v2/models/fashion": `"images"`, "/v2/models/fashion/ready": "true", "/v2/models/fashion/versions/1": `"logits"`,
	} {
		code, text, err := send(http.MethodGet, p.gateway()+path, nil, nil)
		if err != nil || code != 200 || !strings.Contains(text, want) {
			t.Errorf("GET %s: %d %s %v", path, code, text, err)
		}
	}
	request := `{"inputs":[{"name":"images","shape":[1,1,28,28],"datatype":"FP32","data":[` + strings.TrimSuffix(strings.Repeat("0,", 784), ",") + `]}]}`
	code, text, err := send(http.MethodPost, p.gateway()+"/v2/models/fashion/infer", nil, strings.NewReader(request))
	if err != nil || code != 200 || !strings.Contains(text, `"shape":[1,10]`) {
		t.Errorf("infer: %d %s %v", code, text, err)
	}
	p.rxvision(0, "infer", "fashion", "--tensors", write(t, "request.json", request)).has(t, `"logits"`)
	p.rxvision(0, "infer", "-json", "fashion", images[0]).has(t, `"label"`)
	p.rxvision(0, "model", "show", "fashion").has(t, "images", "FP32", "[-1,1,28,28]", "sha256:")
}

// TestStartAgain ends everything by Ctrl-C and finds jobs, models and history
// after the next start, and no process in between.
func TestStartAgain(t *testing.T) {
	p := newPlatform(t, "--demo")
	p.start()
	if err := p.interrupt(); err != nil {
		t.Fatalf("Ctrl-C: %v\n%s", err, p.printed())
	}
	if left := p.processes(); len(left) != 0 {
		t.Fatalf("left behind: %v", left)
	}
	for _, want := range []string{"Ankle boot", "LATENCY", "NOMAD_ADDR=", "curl "} {
		if !strings.Contains(p.printed(), want) {
			t.Errorf("%q was not printed:\n%s", want, p.printed())
		}
	}
	began := time.Now()
	p.start()
	t.Logf("second start with the demonstration: %.1f s (race detector on)", time.Since(began).Seconds())
	var versions struct {
		Versions []struct{ Version uint64 }
	}
	p.get("/v1/job/fashion/versions", &versions)
	if len(versions.Versions) != 1 {
		t.Errorf("versions after the second start: %+v", versions)
	}
	var models []struct {
		Name          string
		LatestVersion uint64
	}
	p.get("/v1/models", &models)
	if len(models) != 1 || models[0].LatestVersion != 1 {
		t.Errorf("models after the second start: %+v", models)
	}
	var evals []struct{ JobID string }
	p.get("/v1/evaluations", &evals)
	if len(evals) < 2 {
		t.Errorf("%d evaluations: the history is gone", len(evals))
	}
}

// TestTakenPort names the port and the way out, and changes nothing.
func TestTakenPort(t *testing.T) {
	p := newPlatform(t)
	p.start()
	q := newPlatform(t)
	q.addrs["gateway-addr"] = p.addrs["gateway-addr"]
	q.launch()
	err := q.cmd.Wait()
	q.cmd = nil
	if err == nil {
		t.Error("dev started on a taken port")
	}
	result{text: q.printed()}.has(t, p.addrs["gateway-addr"]+" is taken", "--gateway-addr", "RXVISION_GATEWAY_ADDR")
	if left := q.processes(); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	// A second dev on the same data.
	r := p.command(binary, append([]string{"dev", "--data-dir", p.data}, p.flags()...)...)
	if r.code != 1 {
		t.Errorf("a second dev on one data folder: exit code %d", r.code)
	}
	r.has(t, "another `rxvision dev`", "--stop")
}
