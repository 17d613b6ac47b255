package api_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// nomadVersion is the release of the command line that the API is held against.
const nomadVersion = "1.11.1"

// nomadBinary finds the pinned nomad, or skips.
func nomadBinary(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../out/tools/nomad-" + nomadVersion + "/nomad")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if path, err = exec.LookPath("nomad"); err == nil {
		out, err := exec.Command(path, "version").Output()
		if err == nil && strings.HasPrefix(string(out), "Nomad v"+nomadVersion+"\n") {
			return path
		}
	}
	t.Skip("there is no nomad " + nomadVersion + ": get it with `make nomad`")
	return ""
}

// cli runs nomad commands against a world.
type cli struct {
	*world
	bin   string
	dir   string
	token string
}

func newCLI(t *testing.T, change ...func(*api.Config)) *cli {
	bin := nomadBinary(t)
	return &cli{world: newWorld(t, change...), bin: bin, dir: t.TempDir()}
}

// try runs a command and gives its exit code and all that it printed.
func (c *cli) try(args ...string) (int, string) {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.bin, args...)
	cmd.Dir = c.dir
	cmd.Env = []string{"NOMAD_ADDR=" + c.url, "HOME=" + c.dir, "PATH=/usr/bin:/bin", "NO_COLOR=1", "NOMAD_TOKEN=" + c.token}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		c.Fatalf("nomad %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	text := string(out)
	if strings.Contains(text, "panic:") || strings.Contains(text, "runtime error") || strings.Contains(text, "goroutine 1") {
		c.Fatalf("nomad %s crashed:\n%s", strings.Join(args, " "), text)
	}
	c.Logf("$ nomad %s\n%s(exit %d)", strings.Join(args, " "), text, cmd.ProcessState.ExitCode())
	return cmd.ProcessState.ExitCode(), text
}

// run runs a command that must succeed and print each of the texts; blanks in a
// row count as one.
func (c *cli) run(line string, want ...string) string {
	c.Helper()
	code, out := c.try(strings.Fields(line)...)
	if code != 0 {
		c.Errorf("nomad %s: exit %d\n%s", line, code, out)
	}
	c.wants(line, out, want)
	return out
}

// fails runs a command that must end with the code and print each of the texts.
func (c *cli) fails(code int, line string, want ...string) string {
	c.Helper()
	got, out := c.try(strings.Fields(line)...)
	if got != code {
		c.Errorf("nomad %s: exit %d, want %d\n%s", line, got, code, out)
	}
	c.wants(line, out, want)
	return out
}

func (c *cli) wants(line, out string, want []string) {
	c.Helper()
	plain := strings.Join(strings.Fields(out), " ")
	for _, text := range want {
		if !strings.Contains(plain, text) {
			c.Errorf("nomad %s does not print %q:\n%s", line, text, out)
		}
	}
}

func (c *cli) file(name, text string) {
	c.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name), []byte(text), 0o644); err != nil {
		c.Fatal(err)
	}
}

const webJob = `job "web" {
  update {
    min_healthy_time  = "1s"
    healthy_deadline  = "30s"
    progress_deadline = "1m"
  }
  group "g" {
    count = 2
    network {
      port "http" {}
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
        args    = ["1000"]
      }
      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
`

const gpuJob = `job "train" {
  type = "batch"
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
      }
      resources {
        device "nvidia/gpu" {
          count = 2
        }
      }
    }
  }
}
`

// running gives the ID of one of a job's running allocations.
func (c *cli) running(job string) string {
	c.Helper()
	for _, a := range c.store.State().Snapshot().AllocsByJob(nil, cluster.JobKey{Namespace: "default", ID: job}) {
		if a.ClientStatus == cluster.AllocClientRunning && !a.ServerTerminal() {
			return a.ID
		}
	}
	c.Fatalf("job %s has no running allocation", job)
	return ""
}

const petsJob = `job "pets" {
  affinity {
    attribute = "${node.unique.name}"
    value     = "cpu-host"
  }
  group "g" {
    count = 2
    constraint {
      distinct_property = "${node.unique.name}"
    }
    spread {
      attribute = "${node.class}"
      target "test" {
        percent = 100
      }
    }
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
        args    = ["1000"]
      }
      resources {
        memory = 64
      }
    }
  }
}
`

// TestCommandLinePreferences shows affinities, spreads and distinct_property as the
// command line's users see them: differences, scores, in-place updates, reasons.
func TestCommandLinePreferences(t *testing.T) {
	c := newCLI(t)
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	c.file("pets.hcl", petsJob)
	c.fails(1, "job plan -verbose pets.hcl", `+ Affinity { + LTarget: "${node.unique.name}" + Operand: "=" + RTarget: "cpu-host" + Weight: "50" }`,
		`+ Spread { + Attribute: "${node.class}" + Weight: "50" + SpreadTarget { + Percent: "100" + Value: "test" } }`, "All tasks successfully allocated")
	c.run("job run -detach pets.hcl")
	c.settled("pets", 2)
	c.run("alloc status -verbose "+c.running("pets"), "node-affinity", "allocation-spread")
	c.run("job inspect pets", `"Weight": 50`, `"SpreadTarget": [`, `"Operand": "distinct_property"`)

	c.file("pets.hcl", strings.Replace(petsJob, `"cpu-host"`, "\"cpu-host\"\n weight = -70", 1))
	c.run("job plan pets.hcl", "(2 in-place update)", `+/- Weight: "50" => "-70"`)
	c.file("pets.hcl", strings.Replace(petsJob, "count = 2", "count = 3", 1))
	c.fails(1, "job plan pets.hcl", "failed to place 1 allocation", `Constraint "distinct_property: ${node.unique.name}=cpu-host used by 1 allocs": 1 nodes excluded by filter`)
}

func TestCommandLineJobs(t *testing.T) {
	c := newCLI(t)
	c.file("web.hcl", webJob)
	c.run("status", "No running jobs")
	c.run("job validate web.hcl", "Job validation successful")
	c.fails(1, "job plan web.hcl", `+ Job: "web"`, `+ Task Group: "g" (2 create)`, "All tasks successfully allocated", "Job Modify Index: 0")
	c.run("job run web.hcl", `Evaluation triggered by job "web"`, `finished with status "complete"`, "Status = successful", "g 2 2 2 0")
	c.settled("web", 2)
	c.run("job plan web.hcl", "Task Group: \"g\" (2 ignore)")
	c.run("job run -detach web.hcl", "Job registration successful", "Evaluation ID: ")
	c.fails(1, "job run -check-index 1 web.hcl", "Enforcing job modify index 1: job exists with conflicting job modify index:")
	c.run("job status", "web service 50 running")
	c.run("job status web", "Status = running", "Datacenters = *", "g 0 0 2 0 0 0 0", "Latest Deployment", "g 2 2 2 0", "run running")
	c.run("job status -verbose web", "Evaluations", "50 job-register complete false", c.running("web"))
	c.run("status web", "ID = web")
	c.run("job inspect web", `"ID": "web"`, `"Count": 2`, `"Driver": "raw_exec"`)
	if out := c.run("job inspect -hcl web"); !strings.Contains(out, webJob) {
		t.Errorf("the source did not come back as it was:\n%s", out)
	}

	c.file("web2.hcl", strings.Replace(webJob, "64", "80", 1))
	c.fails(1, "job plan web2.hcl", `+/- Task Group: "g" (1 create/destroy update, 1 ignore)`, `+/- MemoryMB: "64" => "80"`, "forces create/destroy update")
	c.run("job run web2.hcl", "Status = successful")
	c.settled("web", 2)
	c.run("job history -p web", "Version = 1", "Version = 0", `+/- MemoryMB: "64" => "80"`)
	c.run("job history -version 0 web", "Version = 0", "Stable = true")
	c.run("job deployments web", "web 1 successful", "web 0 successful")
	c.run("job deployments -latest web", "Job Version = 1")
	c.run("job allocs web", "g 1 run running", "g 0 stop complete")
	c.fails(1, "job revert web 99", `job "web" in namespace "default" at version 99 not found`)
	c.run("job revert web 0", `finished with status "complete"`, "Status = successful")
	c.settled("web", 2)
	c.run("job inspect -version 2 web", `"MemoryMB": 64`)
	c.run("job eval web", `finished with status "complete"`)
	c.run("job eval -force-reschedule -detach web", "Created eval ID: ")
	c.run("job scale web g 3", `finished with status "complete"`)
	c.settled("web", 3)
	c.run("job scaling-events web", "Task Group")
	c.run("job status we", "ID = web")
	c.fails(1, "job status nosuch", `No job(s) with prefix or ID "nosuch" found`)

	c.run("job stop web", `Evaluation triggered by job "web"`, `finished with status "complete"`)
	c.settled("web", 0)
	c.run("job status web", "Status = dead (stopped)", "g 0 0 0 0")
	c.run("job start -detach web", "Job start successful")
	c.settled("web", 3)
	c.run("job stop -purge -detach web")
	c.fails(1, "job status web", `No job(s) with prefix or ID "web" found`)
}

func TestCommandLineFaults(t *testing.T) {
	c := newCLI(t)
	c.file("bad.hcl", `job "bad" {
  group "g" {
    count = -1
    task "t" {
      driver = "dokcer"
    }
    task "m" {
      driver = "onnx"
      config {
        model = "fashion"
      }
    }
  }
}
`)
	c.fails(1, "job run bad.hcl", "3 errors occurred", "group.g.count (line 3)", `unknown driver "dokcer"`, `unknown model "fashion": push it first`)
	c.fails(1, "job validate bad.hcl", "3 errors occurred", "group.g.count", `unknown model "fashion"`)
	c.fails(255, "job plan bad.hcl", "3 errors occurred")

	// What does not fit waits, and says why.
	c.file("big.hcl", strings.Replace(strings.Replace(webJob, "memory = 64", "memory = 999999", 1), `"web"`, `"big"`, 1))
	c.fails(1, "job plan big.hcl", "WARNING: Failed to place all allocations", "failed to place 2 allocations", "Resources exhausted on 2 nodes", `Dimension "memory" exhausted on 2 nodes`)
	c.run("job run -detach big.hcl")
	c.until("the evaluation is blocked", func(snap *cluster.Snapshot) bool {
		for _, e := range snap.Evals(nil, "") {
			if e.Status == cluster.EvalStatusBlocked {
				return true
			}
		}
		return false
	})
	c.run("job status big", "Status = pending", "Placement Failure", `Dimension "memory" exhausted on 2 nodes`, "g 2 0 0 0 0 0 0")
	blocked := c.run("eval list -status=blocked -job=big", "queued-allocs big default <none> blocked")
	id := strings.Fields(blocked[strings.Index(blocked, "\n"):])[0]
	c.run("eval status "+id, "Status = blocked", "Previous Eval", "Failed Placements", `Dimension "memory" exhausted on 2 nodes`)
	c.run("eval status -json "+id, `"RelatedEvals": [`)
	c.fails(1, "eval status ffffffff", `No evaluation(s) with prefix or id "ffffffff" found`)

	// A batch job on devices, and one for which they are not enough.
	c.file("train.hcl", gpuJob)
	c.run("job run train.hcl", `finished with status "complete"`)
	c.settled("train", 1)
	c.file("train2.hcl", strings.Replace(gpuJob, `"train"`, `"train2"`, 1))
	c.fails(2, "job run train2.hcl", "failed to place all allocations", "Resources exhausted on 1 nodes", "devices")
}

func TestCommandLineAllocations(t *testing.T) {
	c := newCLI(t)
	c.file("web.hcl", webJob)
	c.run("job run -detach web.hcl")
	c.settled("web", 2)
	id := c.running("web")
	c.run("alloc status "+id[:8], "Name = web.g[", "Client Status = running", "Deployment Health = healthy", `Task "t" is "running"`,
		"12/100 MHz 19 MiB/64 MiB 300 MiB", "Started Task started by client", "*http yes 127.0.0.1:")
	c.run("alloc status -verbose "+id, "Evaluated Nodes = 2", "Placement Metrics", "binpack", "final score")
	c.run("alloc status -short "+id, "t running Started")
	c.run("alloc status -json "+id, `"AllocModifyIndex"`)
	c.run("alloc checks "+id, "Status of 0 Nomad Service Checks")
	c.nodes.write(t, "alloc/logs/t.stdout.0", "one\ntwo\nthree\n")
	c.nodes.write(t, "alloc/logs/t.stderr.0", "oops\n")
	if out := c.run("alloc logs " + id); out != "one\ntwo\nthree\n" {
		t.Errorf("log %q", out)
	}
	if out := c.run("alloc logs -stderr " + id + " t"); out != "oops\n" {
		t.Errorf("log %q", out)
	}
	if out := c.run("alloc logs -tail -n 2 " + id); out != "two\nthree\n" {
		t.Errorf("tail %q", out)
	}
	c.run("alloc logs -task t -job web", "one two three")
	c.run("alloc fs "+id, "drwxr-xr-x", "alloc/")
	c.run("alloc fs "+id+" alloc/logs", "t.stderr.0", "t.stdout.0")
	c.run("alloc fs -stat "+id+" alloc/logs/t.stdout.0", "14 B")
	if out := c.run("alloc fs " + id + " alloc/logs/t.stdout.0"); out != "one\ntwo\nthree\n" {
		t.Errorf("file %q", out)
	}
	if out := c.run("alloc fs -tail -n 1 " + id + " alloc/logs/t.stdout.0"); out != "three\n" {
		t.Errorf("tail of a file %q", out)
	}
	c.fails(1, "alloc fs "+id+" nosuch", "404")
	c.run("alloc restart " + id)
	c.run("alloc signal -s SIGHUP " + id + " t")
	if got := c.nodes.asked(); got != "restart , signal t SIGHUP" {
		t.Errorf("the node was asked to %q", got)
	}
	c.run("alloc stop "+id, `Evaluation triggered by job "web"`, `finished with status "complete"`)
	c.settled("web", 2)
	c.run("alloc status "+id, "Desired Status = stop", "Client Status = complete")
	c.run("job restart -yes -batch-size=1 web", "Job restart")
	c.fails(1, "alloc status ffffffff", `No allocation(s) with prefix or id "ffffffff" found`)
	c.fails(1, "alloc exec "+c.running("web")+" /bin/true", "does not support exec into an allocation")
}

// A followed log goes on until its reader ends it.
func TestCommandLineFollowsLogs(t *testing.T) {
	c := newCLI(t)
	c.file("web.hcl", webJob)
	c.run("job run -detach web.hcl")
	c.settled("web", 2)
	c.nodes.write(t, "alloc/logs/t.stdout.0", "one\ntwo\n")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.bin, "alloc", "logs", "-f", "-stdout", c.running("web"))
	cmd.Env = []string{"NOMAD_ADDR=" + c.url, "HOME=" + c.dir, "NO_COLOR=1"}
	var complaint strings.Builder
	cmd.Stderr = &complaint
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("one\ntwo\n"))
	if _, err := io.ReadFull(out, got); err != nil || string(got) != "one\ntwo\n" {
		t.Errorf("%q, %v", got, err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after Ctrl-C: %v\n%s", err, complaint.String())
	}
}

func TestCommandLineNodes(t *testing.T) {
	c := newCLI(t)
	c.run("node status", "0a1b2c3d default dc1 gpu-host test false eligible ready", "cpu-host")
	c.run("node status -verbose", gpuNode, "127.0.0.1", "1.11.1")
	c.run("node status -verbose "+gpuNode[:8], "Name = gpu-host", "raw_exec true true Healthy", "0/8000 MHz 0 B/16 GiB 0 B/98 GiB",
		"nvidia/gpu/Test A10["+gpuID(0)+"] 512 / 23028 MiB", "nvidia/gpu/Test A10["+gpuID(1)+"]",
		"Device Group = nvidia/gpu/Test A10 driver_version = 999.1 memory = 23028 MiB persistence = true", "os.name = debian", "Node registered")
	c.run("node status -stats "+gpuNode, "Temperature = 41 C", "Idle = 97.00%", "Used = 383 MiB")
	c.run("node status -json "+gpuNode, `"HTTPAddr": ""`, `"Name": "gpu-host"`)
	c.run("node status -filter Name==\"cpu-host\"", "0f000000")
	c.fails(1, "node status ffffffff", `No node(s) with prefix "ffffffff" found`)
	c.run("node eligibility -disable "+gpuNode[:8], "ineligible for scheduling")
	c.run("node status", "gpu-host test false ineligible ready")
	c.run("node eligibility -enable "+gpuNode, "eligible for scheduling")

	c.file("web.hcl", webJob)
	c.run("job run -detach web.hcl")
	snap := c.settled("web", 2)
	busy := snap.Alloc(nil, c.running("web")).NodeID
	c.run("node status "+busy, "200/8000 MHz", "g 0 run running")
	c.run("node drain -enable -yes -m moving "+busy, "drain strategy set", "Drain complete for node "+busy, "All allocations on node")
	c.settled("web", 2)
	c.run("node status "+busy, "Drain = false", "Eligibility = ineligible", "Node drain complete")
	c.run("node drain -disable -yes "+busy, "drain strategy unset")
	c.run("node pool list", "all", "default")
	c.run("node pool nodes default", "gpu-host", "cpu-host")
	c.run("node pool jobs default", "web")
	c.run("node pool info default", "Default node pool.")
	c.run("status "+busy[:8], "ID = "+busy[:8])
}

func TestCommandLineOperators(t *testing.T) {
	c := newCLI(t)
	c.file("web.hcl", webJob)
	c.run("job run -detach web.hcl")
	snap := c.settled("web", 2)
	c.run("server members", "s1.global 127.0.0.1", "alive true 3 0.0.1-test dc1 global")
	c.run("server members -verbose", "id="+c.store.ID())
	c.run("operator raft list-peers", "s1.global "+c.store.ID(), "leader true 3")
	c.fails(1, "operator raft remove-peer -peer-id nope", `id "nope" was not found in the Raft configuration`)
	c.run("agent-info", "raft applied_index", "state = Leader", "leader = true")
	c.run("operator api /v1/regions", `["global"]`)
	c.run("operator metrics", "rxvision_http_requests_total")
	c.run("operator scheduler get-config", "Scheduler Algorithm = binpack")
	c.run("operator scheduler set-config -scheduler-algorithm=spread", "Scheduler configuration updated!")
	c.run("operator scheduler get-config", "Scheduler Algorithm = spread")
	c.run("operator scheduler set-config -preempt-batch-scheduler=true", "Scheduler configuration updated!")
	c.fails(1, "operator scheduler set-config -preempt-system-scheduler=true", "501", "does not support preemption for system")

	e := snap.EvalsByJob(nil, cluster.JobKey{Namespace: "default", ID: "web"})[0]
	c.run("eval list", "job-register web default <none> complete false")
	c.run("job eval -detach web", "Created eval ID")
	c.run("eval list -per-page=1", "Results have been paginated")
	c.run("eval status "+e.ID[:8], "Status = complete", "Job ID = web")
	d := snap.Deployments(nil, "")[0]
	c.run("deployment list", d.ID[:8]+" web 0 successful Deployment completed successfully")
	c.run("deployment status "+d.ID, "Status = successful", "g 2 2 2 0")
	c.run("deployment status "+d.ID[:8], "ID = "+d.ID[:8])
	c.run("deployment list -filter Status==\"running\"", "No deployments found")
	c.fails(1, "deployment fail "+d.ID, "can't fail terminal deployment")
	c.fails(1, "deployment promote "+d.ID, "can't promote terminal deployment")

	c.run("operator snapshot save x.snap", "State file written to x.snap")
	c.run("operator snapshot inspect x.snap", "Version = 1", "Alloc 2", "Node 2", "Job 1")
	c.run("job stop -purge -detach web")
	c.settled("web", 0)
	c.run("operator snapshot restore x.snap", "Snapshot Restored")
	c.run("job status web", "ID = web", "Status = running")
	c.file("bad.snap", "no archive")
	c.fails(1, "operator snapshot restore bad.snap", "is not a gzip file")

	c.run("namespace list", "default Default shared namespace")
	c.run("volume status", "No CSI volumes")
	c.run("service list", "No service registrations found")
	c.fails(1, "acl policy list", "ACL support disabled")
	c.run("system gc")
	c.run("job status web", "Status = running")
}

// TestCommandLineHold: while many nodes are silent everybody who looks sees why nothing
// is replaced; an operator, and nobody else, lets go, and then it is.
func TestCommandLineHold(t *testing.T) {
	c := newCLI(t)
	c.file("web.hcl", webJob)
	c.run("job run -detach web.hcl")
	c.settled("web", 2)
	client, err := api.NewClient(c.url, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := client.Hold(t.Context()); err != nil || h.Held || h.Silent != 0 {
		t.Errorf("without a hold: %+v, %v", h, err)
	}
	reason := "2 of 2 nodes fell silent within 3s"
	c.apply(&cluster.SetFleetHold{Hold: &cluster.FleetHold{Nodes: 2, Of: 2, Reason: reason}})
	c.apply(&cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{
		{NodeID: cpuNode, Status: cluster.NodeStatusDisconnected, Message: "Node heartbeat missed; replacements pause: " + reason},
	}})
	key := cluster.JobKey{Namespace: "default", ID: "web"}
	snap := c.until("an evaluation that waits", func(snap *cluster.Snapshot) bool {
		for _, e := range snap.EvalsByJob(nil, key) {
			if e.Status == cluster.EvalStatusBlocked {
				return true
			}
		}
		return false
	})
	for _, e := range snap.EvalsByJob(nil, key) {
		if e.Status == cluster.EvalStatusBlocked {
			c.run("eval status "+e.ID, "Status = blocked", "replacements are paused: "+reason)
		}
	}
	c.run("node status", "disconnected")
	c.run("node status "+cpuNode, "Status = disconnected", "replacements pause: "+reason)
	h, err := client.Hold(t.Context())
	if err != nil || !h.Held || h.Nodes != 2 || h.Of != 2 || h.Silent != 1 || h.Reason != reason || h.Since == 0 {
		t.Errorf("the hold is %+v, %v", h, err)
	}
	if err := client.ReleaseHold(t.Context()); err != nil {
		t.Error(err)
	}
	snap = c.until("the replacements", func(snap *cluster.Snapshot) bool {
		n := 0
		for _, a := range snap.AllocsByJob(nil, key) {
			if a.ClientStatus == cluster.AllocClientRunning && a.NodeID == gpuNode {
				n++
			}
		}
		return n == 2
	})
	if snap.FleetHold(nil) != nil {
		t.Error("the hold stands")
	}
	if err := client.ReleaseHold(t.Context()); err != nil {
		t.Errorf("without a hold: %v", err)
	}
}
