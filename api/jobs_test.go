package api_test

import (
	"encoding/json"
	"net/http"
	"reflect"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// submit PUTs a job as the command line does, with its source.
func (w *wire) submit(j *nomad.Job, source string, more map[string]any) reply {
	w.Helper()
	body := map[string]any{"Job": j, "Submission": &nomad.JobSubmission{Source: source, Format: "hcl2"}}
	for k, v := range more {
		body[k] = v
	}
	b, err := json.Marshal(body)
	if err != nil {
		w.Fatal(err)
	}
	return w.do(http.MethodPut, "/v1/jobs", string(b))
}

// server is a job with one onnx task.
func onnxJob(id, model string) *nomad.Job {
	task := nomad.NewTask("serve", "onnx").SetConfig("model", model).Require(&nomad.Resources{CPU: ptr(100), MemoryMB: ptr(64)})
	return nomad.NewServiceJob(id, id, region, 50).AddTaskGroup(nomad.NewTaskGroup("g", 1).AddTask(task))
}

func (w *wire) model(name, data string) *cluster.ModelVersion {
	w.Helper()
	r := w.do(http.MethodPut, "/v1/models/"+name, data)
	v := new(cluster.ModelVersion)
	w.decoded(r, v)
	return v
}

// All faults come in one list, models included, each with its line.
func TestRegisterNamesEveryFaultWithItsLine(t *testing.T) {
	w := newWire(t)
	j := onnxJob("vision", "fashion@production")
	j.TaskGroups[0].Count = ptr(-1)
	j.TaskGroups[0].Tasks[0].Resources.Devices = []*nomad.RequestedDevice{{Name: "nvidia/gpu", Count: ptr(uint64(0))}}
	j.TaskGroups[0].AddTask(nomad.NewTask("x", "dokcer"))
	source := `job "vision" {
  group "g" {
    count = -1
    task "serve" {
      driver = "onnx"
      config {
        model = "fashion@production"
      }
      resources {
        device "nvidia/gpu" {
          count = 0
        }
      }
    }
    task "x" {
      driver = "dokcer"
    }
  }
}`
	r := w.submit(j, source, nil)
	if r.status != http.StatusInternalServerError {
		t.Errorf("status %d", r.status)
	}
	for _, want := range []string{
		"4 errors occurred:\n\t* ",
		"group.g.count (line 3): ",
		"group.g.task.serve.resources.device.nvidia/gpu.count (line 11): ",
		`group.g.task.x.driver (line 16): unknown driver "dokcer"`,
		`group.g.task.serve.config.model (line 7): unknown model "fashion"`,
	} {
		if !strings.Contains(r.body, want) {
			t.Errorf("no %q in\n%s", want, r.body)
		}
	}
	if len(w.store.State().Snapshot().Jobs(nil, "*", "")) != 0 {
		t.Error("the job is there")
	}
	var v nomad.JobValidateResponse
	b, err := json.Marshal(map[string]any{"Job": j})
	if err != nil {
		t.Fatal(err)
	}
	w.decoded(w.do(http.MethodPut, "/v1/validate/job", string(b)), &v)
	if len(v.ValidationErrors) != 4 || !strings.HasPrefix(v.Error, "4 errors occurred") {
		t.Errorf("validation: %s", pretty(t, v))
	}
}

// TestPreferences registers affinities and spreads and reads them back; while a server
// does not keep them they are refused.
func TestPreferences(t *testing.T) {
	w := newWire(t)
	j := sleeper("web")
	j.Affinities = []*nomad.Affinity{nomad.NewAffinity("${meta.rack}", "=", "r1", -20)}
	j.Spreads = []*nomad.Spread{nomad.NewSpread("${meta.rack}", 70, []*nomad.SpreadTarget{nomad.NewSpreadTarget("r1", 60)})}
	j.TaskGroups[0].Affinities = []*nomad.Affinity{nomad.NewAffinity("${node.class}", "is_set", "", 100)}
	j.TaskGroups[0].Tasks[0].Affinities = []*nomad.Affinity{{LTarget: "${attr.x}", Operand: ">", RTarget: "1"}}
	w.knows("new", cluster.CurrentRules)
	w.knows("old", 1)
	if r := w.submit(j, "", nil); r.status == http.StatusOK || !strings.Contains(r.body, "upgrade those") {
		t.Errorf("with an older server: %d %s", r.status, r.body)
	}
	w.knows("old", cluster.CurrentRules)
	if r := w.submit(j, "", nil); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	got, _, err := w.client().Jobs().Info("web", nil)
	if err != nil {
		t.Fatal(err)
	}
	j.TaskGroups[0].Tasks[0].Affinities[0].Weight = ptr(int8(50))
	for _, c := range []struct{ got, want any }{
		{got.Affinities, j.Affinities},
		{got.Spreads, j.Spreads},
		{got.TaskGroups[0].Affinities, j.TaskGroups[0].Affinities},
		{got.TaskGroups[0].Tasks[0].Affinities, j.TaskGroups[0].Tasks[0].Affinities},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("got %s, want %s", pretty(t, c.got), pretty(t, c.want))
		}
	}
}

func TestRegister(t *testing.T) {
	w := newWire(t)
	source := "job \"web\" {}\n# byte for byte é\n"
	var first, again nomad.JobRegisterResponse
	w.decoded(w.submit(sleeper("web"), source, nil), &first)
	r := w.submit(sleeper("web"), source, nil)
	w.decoded(r, &again)
	if first.EvalID == "" || again.EvalID == first.EvalID || again.JobModifyIndex != first.JobModifyIndex || again.EvalCreateIndex <= first.EvalCreateIndex {
		t.Errorf("first %+v, again %+v", first, again)
	}
	if r.header.Get("X-Nomad-Index") == "" || r.header.Get("X-Nomad-KnownLeader") != "" {
		t.Errorf("headers of a write: %v", r.header)
	}
	sub, _, err := w.client().Jobs().Submission("web", 0, nil)
	if err != nil || sub.Source != source {
		t.Errorf("source %+v, %v", sub, err)
	}
	for _, c := range []struct {
		job   string
		index uint64
		text  string
	}{
		{"web", 99, "Enforcing job modify index 99: job exists with conflicting job modify index: 1"},
		{"web", 0, "Enforcing job modify index 0: job already exists"},
		{"new", 7, "Enforcing job modify index 7: job does not exist"},
	} {
		w.wants(c.text, w.submit(sleeper(c.job), "", map[string]any{"EnforceIndex": true, "JobModifyIndex": c.index}), 500, c.text)
	}
	w.decoded(w.submit(sleeper("web"), "", map[string]any{"EnforceIndex": true, "JobModifyIndex": first.JobModifyIndex}), &again)
	if r := w.submit(sleeper("web"), "", map[string]any{"EvalPriority": 101}); r.status != 400 {
		t.Errorf("priority 101: %d %s", r.status, r.body)
	}
	if r := w.submit(sleeper("web"), "", map[string]any{"PreserveResources": true}); r.status != 501 {
		t.Errorf("preserve resources: %d %s", r.status, r.body)
	}
	w.apply(&cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{SchedulerAlgorithm: "binpack", RejectJobRegistration: true}})
	w.wants("rejected", w.submit(sleeper("web"), "", nil), 403, "Job registration, dispatch, and scale are disabled by the scheduler configuration")
}

func TestDeregister(t *testing.T) {
	w := newWire(t)
	w.job("web")
	var d nomad.JobDeregisterResponse
	w.decoded(w.do(http.MethodDelete, "/v1/job/web?purge=false&eval_priority=77", ""), &d)
	e := w.store.State().Snapshot().Eval(nil, d.EvalID)
	if e == nil || e.Priority != 77 || e.TriggeredBy != cluster.TriggerJobDeregister || d.EvalCreateIndex != e.CreateIndex {
		t.Errorf("%+v of %+v", e, d)
	}
	w.decoded(w.do(http.MethodDelete, "/v1/job/web?purge", ""), &d)
	w.wants("purged", w.get("/v1/job/web"), 404, "job not found")
	w.decoded(w.do(http.MethodDelete, "/v1/job/nosuch", ""), &d)
	if d.EvalID != "" {
		t.Errorf("an unknown job gave the evaluation %s", d.EvalID)
	}
}

// A plan changes nothing, and says what would fail.
func TestPlan(t *testing.T) {
	w := newWire(t)
	before := w.store.State().Snapshot().Index(nil)
	p, _, err := w.client().Jobs().Plan(sleeper("web"), true, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.Diff == nil || p.Diff.Type != "Added" || p.Annotations == nil || len(p.CreatedEvals) == 0 || p.JobModifyIndex != 0 {
		t.Errorf("plan without nodes: %s", pretty(t, p))
	}
	if m := p.FailedTGAllocs["g"]; m == nil || m.NodesEvaluated != 0 {
		t.Errorf("failures: %s", pretty(t, p.FailedTGAllocs))
	}
	if got := w.store.State().Snapshot().Index(nil); got != before {
		t.Errorf("the plan moved the state from %d to %d", before, got)
	}
	w.node(gpuNode)
	res := w.job("web")
	p, _, err = w.client().Jobs().Plan(sleeper("web"), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.Diff == nil || p.Annotations.DesiredTGUpdates["g"].Place != 1 || p.JobModifyIndex != res.JobModifyIndex || len(p.FailedTGAllocs) != 0 {
		t.Errorf("plan: %s", pretty(t, p))
	}
}

func TestVersionsAndRevert(t *testing.T) {
	w := newWire(t)
	w.model("fashion", "one")
	w.model("fashion", "two")
	w.wants("alias", w.do("PUT", "/v1/models/fashion/alias/production", `{"Version":0}`), 400,
		"Version must be a version of the model; to remove an alias use DELETE")
	w.apply(&cluster.SetAlias{Model: "fashion", Alias: "production", Version: 1})
	if r := w.submit(onnxJob("vision", "fashion@production"), "", nil); r.status != 200 {
		t.Fatal(r.body)
	}
	w.apply(&cluster.SetAlias{Model: "fashion", Alias: "production", Version: 2}) // version 1 of the job follows
	var v struct {
		Versions []*cluster.Job
		Diffs    []*nomad.JobDiff
	}
	w.decoded(w.get("/v1/job/vision/versions?diffs=true"), &v)
	if len(v.Versions) != 2 || v.Versions[0].Version != 1 || len(v.Diffs) != 1 || v.Diffs[0].Type != "Edited" {
		t.Fatalf("versions: %s", pretty(t, v))
	}
	// The old version comes back with the model it had, not with what the alias means now.
	if r := w.do("PUT", "/v1/job/vision/revert", `{"JobID":"vision","JobVersion":0}`); r.status != 200 {
		t.Fatalf("revert: %s", r.body)
	}
	j := w.store.State().Snapshot().Job(nil, cluster.JobKey{Namespace: "default", ID: "vision"})
	task := j.TaskGroups[0].Tasks[0]
	if j.Version != 2 || task.Model.Version != 1 || task.Model.Alias != "" || task.Model.Reference != "fashion:1" || !strings.Contains(string(task.Config), `"fashion:1"`) {
		t.Errorf("reverted job: version %d, %+v, %s", j.Version, task.Model, task.Config)
	}
	w.decoded(w.get("/v1/job/vision/versions?diffs=true&diff_version=0"), &v)
	if len(v.Diffs) != 2 {
		t.Errorf("%d diffs against version 0", len(v.Diffs))
	}
}

func TestScale(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	w.alloc(allocID(1), "web", gpuNode, "d0000000-0000-4000-8000-000000000001")
	w.wants("while a deployment runs", w.do("PUT", "/v1/job/web/scale", `{"Count":2,"Target":{"Group":"g"}}`), 400, "job scaling blocked due to active deployment")
	w.apply(&cluster.UpdateDeployment{Update: &cluster.DeploymentStatusUpdate{DeploymentID: "d0000000-0000-4000-8000-000000000001", Status: cluster.DeploymentFailed}})
	res, _, err := w.client().Jobs().Scale("web", "g", ptr(3), "more", false, nil, nil)
	if err != nil || res.EvalID == "" {
		t.Fatalf("%+v, %v", res, err)
	}
	status, _, err := w.client().Jobs().ScaleStatus("web", nil)
	if err != nil || status.TaskGroups["g"].Desired != 3 || status.TaskGroups["g"].Placed != 1 || len(status.TaskGroups["g"].Events) != 1 || *status.TaskGroups["g"].Events[0].EvalID != res.EvalID {
		t.Errorf("%s, %v", pretty(t, status), err)
	}
	for text, body := range map[string]string{
		"count -1 is not within 0 and 100000":                       `{"Count":-1,"Target":{"Group":"g"}}`,
		"a scaling event that is an error cannot set the count":     `{"Count":1,"Error":true,"Target":{"Group":"g"}}`,
		`task group "" specified for scaling does not exist in job`: `{"Target":{}}`,
	} {
		if r := w.do("PUT", "/v1/job/web/scale", body); r.body != text {
			t.Errorf("%s: %d %s", body, r.status, r.body)
		}
	}
}

func TestParse(t *testing.T) {
	w := newWire(t)
	j, err := w.client().Jobs().ParseHCLOpts(&nomad.JobsParseRequest{
		JobHCL: `variable "n" { default = 1 }
job "x" {
  group "g" {
    count = var.n
  }
}`, Variables: "n = 3", Canonicalize: true,
	})
	if err != nil || *j.ID != "x" || *j.TaskGroups[0].Count != 3 || *j.Priority != 50 {
		t.Errorf("%s, %v", pretty(t, j), err)
	}
	r := w.do("POST", "/v1/jobs/parse", `{"JobHCL":"job \"x\" { datacenters="}`)
	if r.status != 400 || !strings.Contains(r.body, "Failed to parse job: ") || !strings.Contains(r.body, "input.hcl:1") {
		t.Errorf("%d %s", r.status, r.body)
	}
	// The server's disk is not the client's to read.
	r = w.do("POST", "/v1/jobs/parse", `{"JobHCL":"job \"x\" { meta = { a = file(\"/etc/hostname\") } }"}`)
	if r.status != 400 {
		t.Errorf("file(): %d %s", r.status, r.body)
	}
}

func TestEvaluationShape(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	snap := w.store.State().Snapshot()
	first := cluster.Clone(snap.EvalsByJob(nil, cluster.JobKey{Namespace: "default", ID: "web"})[0])
	blocked := cluster.Clone(first)
	blocked.ID, blocked.PreviousEval, blocked.Status, blocked.TriggeredBy = evalID(90), first.ID, cluster.EvalStatusBlocked, cluster.TriggerQueuedAllocs
	other := cluster.Clone(first)
	other.ID = evalID(91)
	first.Status, first.BlockedEval = cluster.EvalStatusComplete, blocked.ID
	first.FailedTGAllocs = map[string]*cluster.AllocMetric{"g": {
		NodesEvaluated: 1, ConstraintFiltered: map[string]int{"x": 1},
		ScoreMetaData: []*cluster.NodeScore{{NodeID: gpuNode, Norm: -466, Scores: map[string]int64{"binpack": 67}}},
	}}
	w.apply(&cluster.UpdateEvals{Evals: []*cluster.Evaluation{first, blocked, other}})
	e, _, err := w.client().Evaluations().Info(first.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := e.FailedTGAllocs["g"].ScoreMetaData[0]
	if s.NormScore != -0.466 || s.Scores["binpack"] != 0.067 {
		t.Errorf("%s", pretty(t, e))
	}
	if r := w.get("/v1/evaluation/" + first.ID); strings.Contains(r.body, "RelatedEvals") {
		t.Errorf("related evaluations that nobody asked for: %s", r.body)
	}
	var full nomad.Evaluation
	w.decoded(w.get("/v1/evaluation/"+blocked.ID+"?related=true"), &full)
	if len(full.RelatedEvals) != 1 || full.RelatedEvals[0].ID != first.ID {
		t.Errorf("related of the blocked: %s", pretty(t, full.RelatedEvals))
	}
	// Nobody waits for evaluations by hand: asking for one makes it.
	res, _, err := w.client().Jobs().ForceEvaluate("web", nil)
	if err != nil || w.store.State().Snapshot().Eval(nil, res) == nil {
		t.Errorf("%s, %v", res, err)
	}
	if r := w.do("PUT", "/v1/job/web/evaluate", ""); r.status != 200 {
		t.Errorf("without a body: %d %s", r.status, r.body)
	}
}

func TestForceReschedule(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	w.alloc(allocID(1), "web", gpuNode, "")
	a := w.store.State().Snapshot().Alloc(nil, allocID(1))
	w.apply(&cluster.UpdateAllocs{NodeID: gpuNode, Allocs: []*cluster.Allocation{{ID: a.ID, Epoch: a.Epoch, ClientStatus: cluster.AllocClientFailed}}})
	w.do("PUT", "/v1/job/web/evaluate", `{"JobID":"web","EvalOptions":{"ForceReschedule":true}}`)
	if f := w.store.State().Snapshot().Alloc(nil, a.ID).DesiredTransition.ForceReschedule; f == nil || !*f {
		t.Error("the failed allocation is not asked to be placed again")
	}
}

func TestAllocationShape(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	w.alloc(allocID(1), "web", gpuNode, "")
	a, _, err := w.client().Allocations().Info(allocID(1), nil)
	if err != nil {
		t.Fatal(err)
	}
	if a.Job == nil || *a.Job.Version != 0 || a.GetTaskGroup() == nil || *a.Resources.CPU != 100 || *a.TaskResources["t"].MemoryMB != 64 ||
		*a.Resources.DiskMB != 300 || a.Metrics.ScoreMetaData[0].NormScore != 0.125 || a.NetworkStatus == nil || a.AllocatedResources.Shared.DiskMB != 300 {
		t.Errorf("%s", pretty(t, a))
	}
	list, _, err := w.client().Allocations().List(nil)
	if err != nil || len(list) != 1 || list[0].AllocatedResources != nil || list[0].JobType != "service" {
		t.Errorf("%s, %v", pretty(t, list), err)
	}
	if r := w.get("/v1/allocations?resources=true"); !strings.Contains(r.body, `"AllocatedResources":{`) {
		t.Errorf("with resources: %s", r.body)
	}
	if got := w.ids(w.get("/v1/allocations?prefix=a000"), "ID"); got != allocID(1) {
		t.Errorf("prefix: %s", got)
	}
	all, _, err := w.client().Nodes().Allocations(gpuNode, nil)
	if err != nil || len(all) != 1 || all[0].Job == nil {
		t.Errorf("%s, %v", pretty(t, all), err)
	}
	stop, err := w.client().Allocations().Stop(a, nil)
	if err != nil || stop.EvalID == "" {
		t.Fatalf("%+v, %v", stop, err)
	}
	got := w.store.State().Snapshot().Alloc(nil, a.ID)
	if m := got.DesiredTransition.Migrate; m == nil || !*m {
		t.Error("the stopped allocation is not asked to move")
	}
}

// An allocation is shown with a job even when the state has forgotten its version.
func TestAllocationOfAForgottenVersion(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	w.alloc(allocID(1), "web", gpuNode, "")
	a := w.store.State().Snapshot().Alloc(nil, allocID(1))
	w.apply(&cluster.UpdateAllocs{NodeID: gpuNode, Allocs: []*cluster.Allocation{{ID: a.ID, Epoch: a.Epoch, ClientStatus: cluster.AllocClientComplete}}})
	for i := range 10 {
		w.job("web", func(j *cluster.Job) { j.Meta = map[string]string{"n": string(rune('a' + i))} })
	}
	if w.store.State().Snapshot().JobVersion(nil, a.JobKey(), 0) != nil {
		t.Fatal("the version is still kept; the test needs more of them")
	}
	got, _, err := w.client().Allocations().Info(a.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.GetTaskGroup() == nil || *got.Job.Version != 0 || *got.Job.Type != "service" || len(got.GetTaskGroup().Tasks) != 1 || got.JobID != "web" {
		t.Errorf("%s", pretty(t, got))
	}
}

func TestDeploymentVerbs(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	id := "d0000000-0000-4000-8000-000000000001"
	w.alloc(allocID(1), "web", gpuNode, id)
	d := w.client().Deployments()
	status := func() string { return w.store.State().Snapshot().Deployment(nil, id).Status }
	if _, _, err := d.Pause(id, true, nil); err != nil || status() != "paused" {
		t.Errorf("pause: %v, %s", err, status())
	}
	res, _, err := d.Pause(id, false, nil)
	if err != nil || status() != "running" || res.EvalID == "" {
		t.Errorf("resume: %v, %s, %+v", err, status(), res)
	}
	w.wants("promote", w.do("PUT", "/v1/deployment/promote/"+id, `{"All":true}`), 500, "no canaries to promote")
	if list, _, err := d.Allocations(id, nil); err != nil || len(list) != 1 {
		t.Errorf("allocations: %v, %v", list, err)
	}
	if res, _, err := d.Fail(id, nil); err != nil || status() != "failed" || res.EvalID == "" || res.DeploymentModifyIndex == 0 {
		t.Errorf("fail: %v, %s", err, status())
	}
	for verb, body := range map[string]string{"fail": "{}", "promote": "{}", "unblock": "{}", "pause": `{"Pause":true}`} {
		w.wants(verb, w.do("PUT", "/v1/deployment/"+verb+"/"+id, body), 500, "can't "+verb+" terminal deployment")
	}
	if latest, _, err := w.client().Jobs().LatestDeployment("web", nil); err != nil || latest.ID != id {
		t.Errorf("latest: %v, %v", latest, err)
	}
}
