package jobspec

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

var update = flag.Bool("update", false, "write the expected complaints beside the bad specs in testdata")

var options = Options{Drivers: Drivers(), Region: "global"}

// overTheWire is the job as a server gets it from the nomad command.
func overTheWire(t *testing.T, job *api.Job) *api.Job {
	t.Helper()
	b, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	out := &api.Job{}
	if err := json.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func mustParse(t testing.TB, src string) *api.Job {
	t.Helper()
	job, _, err := Parse("test.hcl", []byte(src), ParseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return job
}

func mustJob(t testing.TB, src string) *cluster.Job {
	t.Helper()
	job, _, err := FromAPI(mustParse(t, src), options)
	if err != nil {
		t.Fatal(err)
	}
	return job
}

// TestBadSpecs compares what is said about each testdata/*.bad.hcl with the
// complaints expected in the .want file beside it.
func TestBadSpecs(t *testing.T) {
	files, err := filepath.Glob("testdata/*.bad.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("no bad specs: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".bad.hcl"), func(t *testing.T) {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			job, positions, err := Parse(filepath.Base(file), src, ParseOptions{})
			if err == nil {
				var fs Faults
				if _, _, err := FromAPI(job, options); !errors.As(err, &fs) {
					t.Fatalf("error %T %v, want Faults", err, err)
				}
				err = fs.At(positions)
				_, _, remote := FromAPI(overTheWire(t, job), options)
				if remote = Annotate(remote, string(src), FormatHCL); remote.Error() != err.Error() {
					t.Errorf("from a submission:\n%v\nfrom the parser's positions:\n%v", remote, err)
				}
				check(t, file, err)
				return
			}
			check(t, file, err)
		})
	}
}

func check(t *testing.T, file string, err error) {
	t.Helper()
	if cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("code %q, want %q", cluster.CodeOf(err), cluster.CodeInvalid)
	}
	want := strings.TrimSuffix(file, ".hcl") + ".want"
	if *update {
		if err := os.WriteFile(want, []byte(err.Error()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, rerr := os.ReadFile(want)
	if rerr != nil {
		t.Fatal(rerr)
	}
	if err.Error() != string(text) {
		t.Errorf("got:\n%s\nwant:\n%s", err, text)
	}
}

func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../jobs/examples/*.nomad.hcl")
	if err != nil || len(files) < 3 {
		t.Fatalf("examples %v: %v", files, err)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		job, positions, err := Parse(file, src, ParseOptions{})
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		_, warnings, err := FromAPI(job, options)
		var fs Faults
		if errors.As(err, &fs) {
			t.Errorf("%s: %v", file, fs.At(positions))
		}
		for _, w := range warnings {
			if filepath.Base(file) != "share.nomad.hcl" || !strings.Contains(w, "a share of a GPU is counted") {
				t.Errorf("%s: warning %q", file, w)
			}
		}
	}
}

// small is the smallest job, with more lines in the job's block.
func small(more string) string {
	return `
job "small" {
  ` + more + `
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/true"
      }
    }
  }
}`
}

func TestDefaults(t *testing.T) {
	service := mustJob(t, small(""))
	restart := cluster.RestartPolicy{Attempts: 2, Interval: 30 * time.Minute, Delay: 15 * time.Second, Mode: "fail"}
	want := &cluster.Job{
		Region: "global", Namespace: "default", ID: "small", Name: "small", Type: "service", Priority: 50,
		Datacenters: []string{"*"}, NodePool: "default",
		TaskGroups: []*cluster.TaskGroup{{
			Name: "g", Count: 1,
			RestartPolicy:    &restart,
			ReschedulePolicy: &cluster.ReschedulePolicy{Delay: 30 * time.Second, DelayFunction: "exponential", MaxDelay: time.Hour, Unlimited: true},
			EphemeralDisk:    &cluster.EphemeralDisk{SizeMB: 300},
			Update: &cluster.UpdateStrategy{
				Stagger: 30 * time.Second, MaxParallel: 1, HealthCheck: "checks", MinHealthyTime: 10 * time.Second,
				HealthyDeadline: 5 * time.Minute, ProgressDeadline: 10 * time.Minute,
			},
			Migrate: &cluster.MigrateStrategy{MaxParallel: 1, HealthCheck: "checks", MinHealthyTime: 10 * time.Second, HealthyDeadline: 5 * time.Minute},
			Tasks: []*cluster.Task{{
				Name: "t", Driver: "raw_exec", Config: json.RawMessage(`{"command":"/bin/true"}`),
				Resources: &cluster.Resources{CPU: 100, MemoryMB: 300}, RestartPolicy: &restart,
				KillTimeout: 5 * time.Second, LogConfig: &cluster.LogConfig{MaxFiles: 10, MaxFileSizeMB: 10},
			}},
		}},
	}
	if !reflect.DeepEqual(service, want) {
		t.Errorf("service job:\n%s\nwant:\n%s", text(service), text(want))
	}

	batch := mustJob(t, small(`type = "batch"`))
	restart = cluster.RestartPolicy{Attempts: 3, Interval: 24 * time.Hour, Delay: 15 * time.Second, Mode: "fail"}
	want.Type = "batch"
	g := want.TaskGroups[0]
	g.ReschedulePolicy = &cluster.ReschedulePolicy{Attempts: 1, Interval: 24 * time.Hour, Delay: 5 * time.Second, DelayFunction: "constant"}
	g.Update, g.Migrate = nil, nil
	if !reflect.DeepEqual(batch, want) {
		t.Errorf("batch job:\n%s\nwant:\n%s", text(batch), text(want))
	}
}

func text(v any) string {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// full uses every block and field that is honoured.
const full = `
variable "image" { default = "fashion@production" }
job "full" {
  name        = "the full job"
  priority    = 70
  all_at_once = true
  datacenters = ["dc1", "eu-*"]
  node_pool   = "gpus"
  meta { owner = "me" }
  constraint { distinct_hosts = true }
  constraint { distinct_property = "${meta.rack}" }
  affinity {
    attribute = "${attr.cpu.arch}"
    value     = "amd64"
  }
  spread { attribute = "${meta.rack}" }
  update { max_parallel = 2 }
  reschedule { max_delay = "10m" }
  migrate { max_parallel = 3 }
  group "serve" {
    count          = 3
    shutdown_delay = "2s"
    meta { tier = "1" }
    update { min_healthy_time = "1s" }
    reschedule { delay = "20s" }
    disconnect {
      lost_after = "1h"
      reconcile  = "longest_running"
    }
    restart { attempts = 5 }
    ephemeral_disk { size = 500 }
    network {
      port "admin" {
        static = 9100
      }
    }
    constraint {
      attribute = "${attr.kernel.name}"
      value     = "linux"
    }
    affinity {
      attribute = "${attr.gpu.driver}"
      operator  = "is_set"
      weight    = -10
    }
    spread {
      attribute = "${node.datacenter}"
      weight    = 70
      target "dc1" {
        percent = 60
      }
      target "eu-1" {}
    }
    task "serve" {
      driver         = "onnx"
      user           = "nobody"
      leader         = true
      kill_timeout   = "10s"
      kill_signal    = "sigint"
      shutdown_delay = "1s"
      config {
        model   = var.image
        threads = 2
      }
      env { A = "1" }
      meta { m = "2" }
      affinity {
        attribute        = "${meta.tags}"
        set_contains_any = "a,b"
        weight           = 100
      }
      restart { delay = "30s" }
      logs {
        max_files     = 2
        max_file_size = 3
      }
      artifact {
        source      = "https://example.com/labels.txt"
        destination = "local/labels.txt"
        mode        = "file"
        options { checksum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" }
        headers { X-A = "b" }
      }
      template {
        data        = "P={{ env \"NOMAD_PORT_http\" }}"
        destination = "local/env"
        env         = true
        perms       = "0600"
      }
      resources {
        cpu    = 500
        memory = 1024
        device "nvidia/gpu/A100" {
          count = 2
          constraint {
            attribute = "${device.attr.memory}"
            operator  = ">="
            value     = "40 GiB"
          }
          affinity {
            attribute = "${device.attr.memory}"
            operator  = ">"
            value     = "64 GiB"
          }
        }
      }
    }
    task "side" {
      driver = "exec"
      config {
        command = "/bin/sleep"
        args    = ["infinity", 5, true]
      }
    }
  }
}`

// TestDisconnect reads the block and the older names of its settings.
func TestDisconnect(t *testing.T) {
	for _, c := range []struct {
		hcl  string
		want *cluster.DisconnectStrategy
		warn string
	}{
		{"", nil, ""},
		{"disconnect {\n lost_after = \"1h\"\n }", &cluster.DisconnectStrategy{LostAfter: time.Hour, Replace: true, Reconcile: "best_score"}, ""},
		{"disconnect {\n replace = false\n reconcile = \"keep_original\"\n }", &cluster.DisconnectStrategy{Reconcile: "keep_original"}, ""},
		{"max_client_disconnect = \"2h\"", &cluster.DisconnectStrategy{LostAfter: 2 * time.Hour, Replace: true, Reconcile: "best_score"}, "use disconnect { lost_after }"},
		{"prevent_reschedule_on_lost = true", &cluster.DisconnectStrategy{Reconcile: "best_score"}, "use disconnect { replace }"},
		{"disconnect {\n reconcile = \"keep_original\"\n }", nil, "changes nothing"},
	} {
		src := strings.Replace(small(""), "group \"g\" {", "group \"g\" {\n"+c.hcl, 1)
		job, warnings, err := FromAPI(overTheWire(t, mustParse(t, src)), options)
		if err != nil {
			t.Errorf("%s: %v", c.hcl, err)
			continue
		}
		if got := job.TaskGroups[0].Disconnect; !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.hcl, got, c.want)
		}
		if said := strings.Join(warnings, "\n"); (c.warn == "") != (said == "") || !strings.Contains(said, c.warn) {
			t.Errorf("%s: warnings %q, want %q", c.hcl, said, c.warn)
		}
	}
}

// TestPreferences reads affinities, spreads and distinct_property with their defaults.
func TestPreferences(t *testing.T) {
	job := mustJob(t, full)
	g := job.TaskGroups[0]
	for _, c := range []struct{ got, want any }{
		{job.Constraints, []*cluster.Constraint{
			{Operand: "distinct_hosts", RTarget: "true"}, {LTarget: "${meta.rack}", Operand: "distinct_property", RTarget: "1"},
		}},
		{job.Affinities, []*cluster.Affinity{{LTarget: "${attr.cpu.arch}", Operand: "=", RTarget: "amd64", Weight: 50}}},
		{job.Spreads, []*cluster.Spread{{Attribute: "${meta.rack}", Weight: 50}}},
		{g.Affinities, []*cluster.Affinity{{LTarget: "${attr.gpu.driver}", Operand: "is_set", Weight: -10}}},
		{g.Spreads, []*cluster.Spread{{
			Attribute: "${node.datacenter}", Weight: 70, SpreadTarget: []*cluster.SpreadTarget{{Value: "dc1", Percent: 60}, {Value: "eu-1"}},
		}}},
		{g.Tasks[0].Affinities, []*cluster.Affinity{{LTarget: "${meta.tags}", Operand: "set_contains_any", RTarget: "a,b", Weight: 100}}},
		{g.Tasks[0].Resources.Devices[0].Affinities, []*cluster.Affinity{{LTarget: "${device.attr.memory}", Operand: ">", RTarget: "64 GiB", Weight: 50}}},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("got %s, want %s", text(c.got), text(c.want))
		}
	}
	// An affinity has every operator that looks at a node alone.
	for _, operator := range comparisons {
		value := ">= 1.0.0"
		if operator == "is_set" || operator == "is_not_set" {
			value = ""
		}
		job := mustParse(t, small(""))
		job.Affinities = []*api.Affinity{{LTarget: "${attr.x}", Operand: operator, RTarget: value}}
		if _, _, err := FromAPI(job, options); err != nil {
			t.Errorf("%s: %v", operator, err)
		}
	}
}

// TestManySpreads refuses more of what every placement has to look at than is bounded.
func TestManySpreads(t *testing.T) {
	for n, want := range map[int]string{MaxSpreads: "", MaxSpreads + 1: "at most 16"} {
		for _, block := range []string{"spread {\n attribute = \"${meta.m%d}\"\n }\n", "constraint {\n distinct_property = \"${meta.m%d}\"\n }\n"} {
			var src strings.Builder
			for i := range n {
				fmt.Fprintf(&src, block, i)
			}
			_, _, err := FromAPI(mustParse(t, small(src.String())), options)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%d of %s: error %v", n, block, err)
			}
		}
	}
}

// TestShares takes requests for a part of a GPU, and tells of each in what it differs from what can be had.
func TestShares(t *testing.T) {
	for _, c := range []struct {
		devices string
		want    []string // parts of the faults; none: it is taken, with a warning
	}{
		{`device "nvidia/gpu-milli" { count = 250 }`, nil},
		{`device "nvidia/gpu-mib" { count = 8192 }`, nil},
		{"device \"nvidia/gpu-milli/T4\" { count = 1 }\n device \"nvidia/gpu-mib\" { count = 1 }", nil},
		{`device "nvidia/gpu-milli" { count = 1000 }`, []string{`is 1000 thousandths of a GPU`, `device "nvidia/gpu"`}},
		{`device "nvidia/gpu-milli" { count = 0 }`, []string{"is 0"}},
		{"device \"nvidia/gpu\" {}\n device \"nvidia/gpu-mib\" { count = 1 }", []string{"a task can have either"}},
		{"device \"nvidia/gpu-milli\" { count = 1 }\n device \"gpu-milli\" { count = 1 }", []string{"second request for a share"}},
		{"device \"nvidia/gpu-milli/T4\" { count = 1 }\n device \"nvidia/gpu-mib/A100\" { count = 1 }", []string{"names another model"}},
		{`device "nvidia/gpu-mili" { count = 1 }`, []string{`unknown device "nvidia/gpu-mili"`, "nvidia/gpu-milli"}},
	} {
		src := strings.Replace(small(""), `task "t" {`, "task \"t\" {\n resources {\n"+c.devices+"\n}", 1)
		_, warnings, err := FromAPI(overTheWire(t, mustParse(t, src)), options)
		if c.want == nil {
			if said := strings.Join(warnings, "\n"); err != nil || !strings.Contains(said, "the GPU itself does not hold tasks to it") {
				t.Errorf("%s: %v, warnings %q", c.devices, err, said)
			}
			continue
		}
		for _, w := range c.want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v, want %q", c.devices, err, w)
			}
		}
	}
}

// TestAnswersAreJobs checks that a job as our API answers it is a job in the api
// package's eyes, with no key that the package does not know but Task.Model, and
// that submitting it again changes nothing.
func TestAnswersAreJobs(t *testing.T) {
	job := mustJob(t, full)
	g := job.TaskGroups[0]
	if got := *g.Update; got.MaxParallel != 2 || got.MinHealthyTime != time.Second || got.HealthyDeadline != 5*time.Minute {
		t.Errorf("update of job and group merged to %+v", got)
	}
	if got := *g.Tasks[0].RestartPolicy; got.Attempts != 5 || got.Delay != 30*time.Second || got.Interval != 30*time.Minute {
		t.Errorf("restart of group and task merged to %+v", got)
	}
	if got := *g.ReschedulePolicy; got.MaxDelay != 10*time.Minute || got.Delay != 20*time.Second {
		t.Errorf("reschedule of job and group merged to %+v", got)
	}
	wantModel := cluster.ModelRef{Reference: "fashion@production", Name: "fashion", Alias: "production"}
	if got := g.Tasks[0].Model; got == nil || *got != wantModel {
		t.Errorf("model %+v, want %+v", got, wantModel)
	}
	if got := string(g.Tasks[1].Config); got != `{"args":["infinity","5","true"],"command":"/bin/sleep"}` {
		t.Errorf("config %s", got)
	}
	wantNet := &cluster.NetworkResource{
		Mode:          "host",
		ReservedPorts: []cluster.Port{{Label: "admin", Value: 9100, HostNetwork: "default"}},
		DynamicPorts:  []cluster.Port{{Label: "http", HostNetwork: "default"}},
	}
	if len(g.Networks) != 1 || !reflect.DeepEqual(g.Networks[0], wantNet) {
		t.Errorf("networks %s, want the dynamic port http added", text(g.Networks))
	}

	job.Status, job.Stable, job.Version, job.SubmitTime = "running", true, 3, 12345
	job.CreateIndex, job.ModifyIndex, job.JobModifyIndex = 10, 20, 15
	answer, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range jsonPositions(answer, Positions{}) {
		if !strings.Contains(f.Text, `unknown key "Model"`) {
			t.Errorf("the api package does not know: %v", f)
		}
	}
	back := &api.Job{}
	if err := json.Unmarshal(answer, back); err != nil {
		t.Fatal(err)
	}
	again, _, err := FromAPI(back, options)
	if err != nil {
		t.Fatal(err)
	}
	if *back.Status != "running" || *back.Version != 3 || *back.SubmitTime != 12345 || *back.JobModifyIndex != 15 {
		t.Errorf("status, version or indexes lost: %s", text(back))
	}
	job.Status, job.Stable, job.Version, job.SubmitTime = "", false, 0, 0
	job.CreateIndex, job.ModifyIndex, job.JobModifyIndex = 0, 0, 0
	if !reflect.DeepEqual(again, job) {
		t.Errorf("submitted again:\n%s\nwant:\n%s", text(again), text(job))
	}
	if d := Diff(job, again, true, nil); d.Type != diffNone {
		t.Errorf("diff of a job with itself: %s", text(d))
	}
}

// TestFilledIn submits a job as a server of Nomad answers it, with the defaults of
// blocks that are not honoured filled in.
func TestFilledIn(t *testing.T) {
	job := overTheWire(t, mustParse(t, full))
	job.Canonicalize()
	task := job.TaskGroups[0].Tasks[0]
	task.Identity = &api.WorkloadIdentity{Name: "default", Audience: []string{"nomadproject.io"}}
	task.Resources.DiskMB, task.Resources.IOPS, task.Resources.MemoryMaxMB = new(int), new(int), new(int)
	job.TaskGroups[0].Consul = &api.Consul{Cluster: "default"}
	job.TaskGroups[0].Scaling = nil
	job.TaskGroups[0].Tasks[1].Affinities = []*api.Affinity{}
	got, _, err := FromAPI(job, options)
	if err != nil {
		t.Fatal(err)
	}
	if want := mustJob(t, full); !reflect.DeepEqual(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", text(got), text(want))
	}
}

// TestNull checks that holes in JSON are faults, not crashes.
func TestNull(t *testing.T) {
	for _, src := range []string{
		`{}`, `{"Job": {}}`, `{"ID": "a", "TaskGroups": [null]}`, `{"ID": "a", "TaskGroups": [{"Tasks": [null]}]}`,
		`{"ID": "a", "TaskGroups": [{"Name": "g", "Constraints": [null], "Networks": [null],
			"Affinities": [null], "Spreads": [null, {"Attribute": "${meta.a}", "SpreadTarget": [null]}], "Tasks": [{
			"Name": "t", "Driver": "raw_exec", "Config": {"command": null}, "Artifacts": [null], "Templates": [null],
			"Constraints": [null], "Resources": {"Devices": [null]}}]}]}`,
	} {
		job, _, err := Parse("a.json", []byte(src), ParseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := FromAPI(job, options); err == nil {
			t.Errorf("%s: no fault", src)
		}
	}
	if _, _, err := FromAPI(nil, options); err == nil {
		t.Error("no job: no fault")
	}
}

func TestJSON(t *testing.T) {
	good := mustParse(t, full)
	want := mustJob(t, full)
	bare, err := json.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, src := range [][]byte{bare, []byte(`{"Job":` + string(bare) + `}`), []byte("\n\t " + string(bare))} {
		job, _, err := Parse("job.json", src, ParseOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := FromAPI(job, options)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got:\n%s\nwant:\n%s", text(got), text(want))
		}
	}
}

func TestBadJSON(t *testing.T) {
	const src = `{
  "Job": {
    "ID": "j",
    "Update": {"Canary": -1},
    "TaskGroups": [
      {
        "Count": -1,
        "Name": "web",
        "Constraints": [
          {"Operand": "="},
          {"Operand": "nope"}
        ],
        "Networks": [{"ReservedPorts": [
          {"Label": "a", "Value": 1},
          {"Label": "a", "Value": 2}
        ]}],
        "Tasks": [
          {"Name": "x",
           "Driver": "dokcer"}
        ]
      }
    ]
  }
}`
	job, positions, err := Parse("job.json", []byte(src), ParseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = FromAPI(job, options)
	var fs Faults
	if !errors.As(err, &fs) {
		t.Fatalf("error %v, want Faults", err)
	}
	want := `7 errors occurred:
	* group.web.update.canary (line 4): is -1; it must be between 0 and 100000
	* group.web.count (line 7): must not be negative
	* group.web.constraint[0] (line 10): has no attribute to compare
	* group.web.constraint[0] (line 10): operator "=" needs a value
	* group.web.constraint[1].operator (line 11): unknown operator "nope"; did you mean "not"?; known: =, ==, is, !=, not, <, <=, >, >=, regexp, version, semver, set_contains, set_contains_all, set_contains_any, is_set, is_not_set, distinct_hosts, distinct_property
	* group.web.network.port.a (line 14): is there twice; the labels of a group's ports must differ
	* group.web.task.x.driver (line 19): unknown driver "dokcer"; known: onnx, raw_exec, exec

`
	if got := fs.At(positions).Error(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got := Annotate(err, src, FormatJSON).Error(); got != want {
		t.Errorf("from a submission:\n%s\nwant:\n%s", got, want)
	}

	for name, c := range map[string]struct{ src, want string }{
		"syntax":      {"{\n \"ID\": ,\n}", "job.json:2,9: not valid JSON"},
		"type":        {"{\n \"ID\": \"a\",\n \"Priority\": \"high\"\n}", `job.json:3,20: Priority holds a JSON string, which is no int`},
		"duration":    {`{"ID": "a", "TaskGroups": [{"Tasks": [{"KillTimeout": "5s"}]}]}`, "number of nanoseconds"},
		"unknown key": {"{\n \"Job\": {\n \"Prioritty\": 5}}", `job (line 3): unknown key "Prioritty"; did you mean "Priority"?`},
		"deeper key":  {"{\"TaskGroups\": [{\"Name\": \"g\",\n \"Cuont\": 5}]}", `group.g (line 2): unknown key "Cuont"; did you mean "Count"?`},
	} {
		_, _, err := Parse("job.json", []byte(c.src), ParseOptions{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q in it", name, err, c.want)
		}
	}
}

func TestVariables(t *testing.T) {
	const src = `
variable "n" { type = number }
variable "cmd" { default = "/bin/true" }
job "v" {
  group "g" {
    count = var.n
    task "t" {
      driver = "raw_exec"
      config { command = var.cmd }
    }
  }
}`
	dir := t.TempDir()
	file := filepath.Join(dir, "vars.hcl")
	if err := os.WriteFile(file, []byte(`cmd = "/bin/false"`), 0o600); err != nil {
		t.Fatal(err)
	}
	o := ParseOptions{Vars: []string{"n=4"}, VarFiles: []string{file}}
	job, _, err := Parse("v.hcl", []byte(src), o)
	if err != nil {
		t.Fatal(err)
	}
	if n, cmd := *job.TaskGroups[0].Count, job.TaskGroups[0].Tasks[0].Config["command"]; n != 4 || cmd != "/bin/false" {
		t.Errorf("count %d, command %v", n, cmd)
	}
	sub, err := Submission([]byte(src), o)
	if err != nil {
		t.Fatal(err)
	}
	want := &api.JobSubmission{Source: src, Format: "hcl2", VariableFlags: map[string]string{"n": "4"}, Variables: `cmd = "/bin/false"`}
	if !reflect.DeepEqual(sub, want) {
		t.Errorf("submission %s, want %s", text(sub), text(want))
	}
	if _, _, err := Parse("v.hcl", []byte(src), ParseOptions{Env: []string{"NOMAD_VAR_n=2"}}); err != nil {
		t.Error(err)
	}
	if _, _, err := Parse("v.hcl", []byte(src), ParseOptions{}); err == nil || !strings.Contains(err.Error(), `Unset variable "n"`) {
		t.Errorf("variable without a value: %v", err)
	}
	if _, _, err := Parse("v.hcl", []byte(src), ParseOptions{Vars: []string{"n=1", "typo=1"}}); err == nil || !strings.Contains(err.Error(), "typo") {
		t.Errorf("undeclared variable: %v", err)
	}
	if _, _, err := Parse("v.hcl", []byte(src), ParseOptions{VarFiles: []string{filepath.Join(dir, "missing.hcl")}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing variable file: %v", err)
	}
}

// TestDisk checks that a source reads the disk only where that is allowed.
func TestDisk(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cmd"), []byte("/bin/true"), 0o600); err != nil {
		t.Fatal(err)
	}
	src := []byte(strings.Replace(small(""), `"/bin/true"`, `file("cmd")`, 1))
	name := filepath.Join(dir, "v.hcl")
	job, _, err := Parse(name, src, ParseOptions{AllowFS: true})
	if err != nil || job.TaskGroups[0].Tasks[0].Config["command"] != "/bin/true" {
		t.Errorf("allowed: %v", err)
	}
	if _, _, err := Parse(name, src, ParseOptions{}); err == nil || !strings.Contains(err.Error(), "filesystem function disabled") {
		t.Errorf("not allowed: error %v", err)
	}
}

func TestBounds(t *testing.T) {
	for name, src := range map[string]string{
		"size":        `job "a" {}` + strings.Repeat("\n", MaxSource),
		"HCL depth":   `x = ` + strings.Repeat("[", 100_000),
		"blocks":      strings.Repeat("a {\n", 1000),
		"templates":   `x = ` + strings.Repeat(`"${`, 1000),
		"sum":         `job "a" { priority = 1` + strings.Repeat("+1", maxOperators+1) + "\n}",
		"minus":       `job "a" { priority = ` + strings.Repeat("-", maxOperators+1) + "1\n}",
		"not":         `job "a" { all_at_once = ` + strings.Repeat("!", maxOperators+1) + "true\n}",
		"condition":   `job "a" { priority = ` + strings.Repeat("true?1:", maxOperators+1) + "1\n}",
		"index":       `job "a" { priority = a` + strings.Repeat("[0]", maxOperators+1) + "\n}",
		"JSON arrays": `{"Job":` + strings.Repeat("[", 500_000),
		"JSON":        strings.Repeat(`{"Job":`, 30_000),
	} {
		if _, _, err := Parse("a", []byte(src), ParseOptions{}); err == nil || cluster.CodeOf(err) != cluster.CodeInvalid {
			t.Errorf("%s: error %v", name, err)
		}
		if err := Annotate(Faults{{Path: "group.a.count", Text: "x"}}, src, FormatHCL); len(err.Error()) > 100 {
			t.Errorf("%s: annotated to %v", name, err)
		}
	}
	// At the limit the parsers' stacks hold.
	chain := small("priority = 1" + strings.Repeat("+1", maxOperators-100))
	if _, _, err := FromAPI(mustParse(t, chain), options); err == nil || !strings.Contains(err.Error(), "is 19901; it must be") {
		t.Errorf("a long sum: error %v", err)
	}

	many := make(Faults, 250)
	for i := range many {
		many[i] = Fault{Path: "p", Text: "wrong"}
	}
	if got := many.Error(); !strings.HasPrefix(got, "250 errors occurred:") || !strings.Contains(got, "and 150 more") {
		t.Errorf("250 faults read: %s", got)
	}
	if err := os.ErrNotExist; !errors.Is(Annotate(err, full, FormatHCL), err) {
		t.Error("Annotate changed another error")
	}
}

func TestPanicOfDecoder(t *testing.T) {
	_, _, err := Parse("a.hcl", []byte(strings.Replace(small(""), `"/bin/true"`, `convert([{a = "b"}, null], list(map(string)))`, 1)), ParseOptions{})
	if cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("error %v", err)
	}
}

func TestWarnings(t *testing.T) {
	job := mustParse(t, small("update {\n max_parallel = 4\n }"))
	_, warnings, err := FromAPI(job, options)
	if err != nil || len(warnings) != 1 || !strings.HasPrefix(warnings[0], "group.g.update.max_parallel: is 4 with a count of 1") {
		t.Errorf("warnings %q, error %v", warnings, err)
	}
	two := strings.Replace(small("update {\n canary = 1\n auto_revert = true\n health_check = \"manual\"\n }"), "\n}", `
  group "other" {
    update { auto_promote = true }
    task "t" {
      driver = "raw_exec"
      config { command = "/bin/true" }
    }
  }
}`, 1)
	got, warnings, err := FromAPI(mustParse(t, two), options)
	if err != nil || len(warnings) != 1 || !strings.HasPrefix(warnings[0], "group.g.update.auto_promote: ") {
		t.Fatalf("warnings %q, error %v", warnings, err)
	}
	if u := got.TaskGroups[1].Update; u.Canary != 1 || !u.AutoPromote || !u.AutoRevert || u.HealthCheck != "manual" {
		t.Errorf("update %+v", u)
	}
}

// TestScalingWarnings: what a policy asks for that cannot be measured, or would never end, is told when it is registered.
func TestScalingWarnings(t *testing.T) {
	policy := func(source, query string) string {
		return fmt.Sprintf(`scaling {
    min = 0
    max = 3
    policy {
      cooldown_on_scale_up = "10s"
      check "load" {
        source = %q
        query  = %q
        strategy "target-value" { target = 5 }
      }
    }
  }`, source, query)
	}
	asleep := "group.g.scaling.min: is 0, but the group serves no model whose requests would wake it"
	for text, want := range map[string][]string{
		policy("rxvision", "cpu"):        {asleep},
		policy("rxvision", "gpu"):        {`group.g.scaling.policy.check.load.query: no task asks for a GPU: "gpu" will be missing`, asleep},
		policy("rxvision", "queue_time"): {`group.g.scaling.policy.check.load.query: no task serves a model: "queue_time" will be missing`, asleep},
		policy("rxvison", "cpu"):         {`group.g.scaling.policy.check: none has the source "rxvision": the policy is kept for another autoscaler, and the servers scale nothing by it; did you mean "rxvision"?`},
		policy("prometheus", "up"):       {`group.g.scaling.policy.check: none has the source "rxvision"`},
	} {
		job, warnings, err := FromAPI(mustParse(t, strings.Replace(small(""), `group "g" {`, "group \"g\" {\n"+text, 1)), options)
		if err != nil || len(warnings) != len(want) {
			t.Errorf("%s\nwarnings %q, error %v", text, warnings, err)
			continue
		}
		for i, w := range want {
			if !strings.HasPrefix(warnings[i], w) {
				t.Errorf("warning %q, want %q", warnings[i], w)
			}
		}
		if s := job.TaskGroups[0].Scaling; len(s.Checks) > 0 && (s.CooldownUp != 10*time.Second || s.Cooldown != DefaultScalingCooldown) {
			t.Errorf("cooldowns %s, %s", s.CooldownUp, s.Cooldown)
		}
	}
}

func TestInputStaysAsItIs(t *testing.T) {
	job := mustParse(t, full)
	before := text(job)
	got, _, err := FromAPI(job, options)
	if err != nil {
		t.Fatal(err)
	}
	got.Datacenters[0], got.Meta["owner"] = "changed", "changed"
	got.TaskGroups[0].Tasks[0].Env["A"] = "changed"
	if after := text(job); after != before {
		t.Errorf("FromAPI or its result changed its input:\n%s\nwas:\n%s", after, before)
	}
}

// TestReplicated checks that a job survives the log's codec unchanged.
func TestReplicated(t *testing.T) {
	job := mustJob(t, full)
	if got := cluster.Clone(job); !bytes.Equal([]byte(text(got)), []byte(text(job))) {
		t.Errorf("after the codec:\n%s\nwas:\n%s", text(got), text(job))
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	for _, glob := range []string{"testdata/*.hcl", "../jobs/examples/*.hcl"} {
		files, _ := filepath.Glob(glob)
		for _, file := range files {
			src, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(src)
		}
	}
	wire, err := json.Marshal(mustParse(f, full))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Add([]byte(`{"Job": {"ID": "a", "TaskGroups": [null, {"Tasks": [{}]}]}}`))
	f.Fuzz(func(t *testing.T, src []byte) {
		for _, costly := range []string{"bcrypt", "range", "format", "rsadecrypt", "setproduct"} {
			if bytes.Contains(src, []byte(costly)) {
				return // what expressions cost is not bounded
			}
		}
		_ = Annotate(Faults{{Path: "group.g.task.t.driver", Text: "x"}}, string(src), FormatHCL)
		_ = Annotate(Faults{{Path: "group.g.task.t.driver", Text: "x"}}, string(src), FormatJSON)
		job, _, err := Parse("fuzz.hcl", src, ParseOptions{})
		if err != nil {
			return
		}
		got, _, err := FromAPI(job, options)
		if err != nil {
			return
		}
		b, err := json.Marshal(got)
		if err != nil {
			t.Fatalf("an accepted job has no JSON: %v", err)
		}
		back := &api.Job{}
		if err := json.Unmarshal(b, back); err != nil {
			t.Fatalf("an accepted job's JSON is no job: %v\n%s", err, b)
		}
		again, _, err := FromAPI(back, options)
		if err != nil {
			t.Fatalf("an accepted job is refused when submitted again: %v\n%s", err, b)
		}
		if text(again) != text(got) {
			t.Errorf("submitted again:\n%s\nwant:\n%s", text(again), text(got))
		}
	})
}

// TestHonouredFieldsExist guards the table against names that are no fields.
func TestHonouredFieldsExist(t *testing.T) {
	for typ, names := range honoured {
		for _, name := range strings.Fields(names) {
			if _, ok := typ.FieldByName(name); !ok {
				t.Errorf("%s has no field %s", typ, name)
			}
		}
	}
	for _, name := range strings.Fields(setByState) {
		if _, ok := reflect.TypeFor[api.Job]().FieldByName(name); !ok {
			t.Errorf("api.Job has no field %s", name)
		}
	}
	for path := range neutral {
		block, name, _ := strings.Cut(path, ".")
		for typ := range honoured {
			if _, ok := typ.FieldByName(name); typ.Name() == block && !ok {
				t.Errorf("%s has no field %s", typ, name)
			}
		}
	}
}
