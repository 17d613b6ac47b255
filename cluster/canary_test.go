package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// trial is a job whose version 0 runs, and version 1 has canaries.
type trial struct {
	*harness
	job, d string
	key    JobKey
}

func newTrial(t *testing.T, count, canaries int, change ...func(*UpdateStrategy)) *trial {
	h := newHarness(t)
	c := &trial{harness: h, job: "web", key: JobKey{DefaultNamespace, "web"}}
	h.must(&RegisterNode{Node: testNode(trialNode)})
	first := c.version("v1", count, 0, change...)
	h.must(&RegisterJob{Job: first, EvalID: h.id()})
	c.deploy(count, 0)
	for i := range count {
		c.place(fmt.Sprintf("old%d", i), i, 0, false)
		c.health(fmt.Sprintf("old%d", i), true)
	}
	c.ended(DeploymentSuccessful, DeploymentDescSuccessful)
	h.must(&RegisterJob{Job: c.version("v2", count, canaries, change...), EvalID: h.id()})
	c.deploy(count, canaries)
	for i := range canaries {
		c.place(fmt.Sprintf("new%d", i), i, 1, true)
	}
	return c
}

func (c *trial) version(command string, count, canaries int, change ...func(*UpdateStrategy)) *Job {
	j := testJob(c.job, count)
	j.TaskGroups[0].Tasks[0].Config = []byte(`{"command":"` + command + `"}`)
	u := &UpdateStrategy{MaxParallel: 1, Canary: canaries, ProgressDeadline: time.Minute}
	for _, f := range change {
		f(u)
	}
	j.TaskGroups[0].Update = u
	return j
}

func (c *trial) plan(p *Plan) {
	c.Helper()
	e := c.Snapshot().OpenEvalsByJob(c.key)
	if len(e) == 0 {
		id := c.id()
		c.must(&UpdateEvals{Evals: []*Evaluation{{ID: id, Namespace: c.key.Namespace, JobID: c.key.ID, Status: EvalStatusPending, Type: JobTypeService}}})
		e = c.Snapshot().OpenEvalsByJob(c.key)
	}
	p.EvalID, p.Namespace, p.JobID = e[0].ID, c.key.Namespace, c.key.ID
	p.JobVersion = c.Snapshot().Job(nil, c.key).Version
	if res := c.must(&ApplyPlans{Plans: []*Plan{p}}); res.Plans[0].Stale || len(res.Plans[0].Refused) > 0 {
		c.Fatalf("plan: %+v", res.Plans[0])
	}
}

// deploy creates the deployment of the job's version.
func (c *trial) deploy(count, canaries int) {
	c.Helper()
	j := c.Snapshot().Job(nil, c.key)
	u := j.TaskGroups[0].Update
	c.d = c.id()
	d := &Deployment{
		ID: c.d, Namespace: c.key.Namespace, JobID: c.key.ID, JobVersion: j.Version, JobCreateIndex: j.CreateIndex, Status: DeploymentRunning,
		TaskGroups: map[string]*DeploymentState{j.TaskGroups[0].Name: {
			DesiredTotal: count, DesiredCanaries: canaries, AutoRevert: u.AutoRevert, AutoPromote: u.AutoPromote, ProgressDeadline: u.ProgressDeadline,
		}},
	}
	d.StatusDescription = d.RunningDescription()
	c.plan(&Plan{Deployment: d})
}

const trialNode = "0000000a-0000-4000-8000-000000000001"

// alloc makes an allocation of a version.
func (c *trial) alloc(id string, version uint64) *Allocation {
	a := testAlloc(c.harness, &Evaluation{}, c.Snapshot().JobVersion(nil, c.key, version), c.Snapshot().Node(nil, trialNode))
	a.ID = id
	return a
}

func (c *trial) place(id string, index int, version uint64, canary bool) {
	c.Helper()
	a := c.alloc(id, version)
	a.Name, a.DeploymentID = fmt.Sprintf("web.web[%d]", index), c.d
	if canary {
		a.DeploymentStatus = &AllocDeploymentStatus{Canary: true}
	}
	c.plan(&Plan{Place: []*Allocation{a}})
}

func (c *trial) health(id string, healthy bool) {
	c.Helper()
	c.must(&UpdateAllocs{Allocs: []*Allocation{{ID: id, ClientStatus: AllocClientRunning, DeploymentStatus: &AllocDeploymentStatus{Healthy: &healthy}}}})
}

func (c *trial) deployment() (*Deployment, *DeploymentState) {
	c.Helper()
	d := c.Snapshot().Deployment(nil, c.d)
	for _, g := range d.TaskGroups {
		return d, g
	}
	return d, nil
}

// ended wants the deployment to be so.
func (c *trial) ended(status, description string) {
	c.Helper()
	if d, _ := c.deployment(); d.Status != status || d.StatusDescription != description {
		c.Errorf("the deployment is %s: %s; want %s: %s", d.Status, d.StatusDescription, status, description)
	}
}

func (c *trial) promote(groups ...string) Result {
	c.Helper()
	res := c.must(&PromoteDeployment{DeploymentID: c.d, Groups: groups, EvalID: c.id()})
	return res
}

func (c *trial) refuses(cmd Command, text string) {
	c.Helper()
	if res := c.do(cmd); res.Err == nil || !strings.Contains(res.Err.Text, text) {
		c.Errorf("%T gave %v, want %q", cmd, res.Err, text)
	}
}

func TestPromote(t *testing.T) {
	c := newTrial(t, 3, 2)
	c.ended(DeploymentRunning, DeploymentDescNeedsPromotion)
	if _, g := c.deployment(); len(g.PlacedCanaries) != 2 || g.RequireProgressBy == 0 {
		t.Errorf("after placement: %+v", g)
	}
	c.refuses(&PromoteDeployment{DeploymentID: c.d, EvalID: c.id()}, `has 0/2 healthy allocations`)
	c.refuses(&PromoteDeployment{DeploymentID: c.d, Groups: []string{"nope"}}, `no task group "nope"`)
	c.refuses(&PromoteDeployment{DeploymentID: "nope"}, "deployment not found")
	c.health("new0", true)
	d, g := c.deployment()
	if due := c.Snapshot().ProgressDue(d); due != g.RequireProgressBy || due == 0 {
		t.Errorf("with one of two healthy the deployment is due at %d, want %d", due, g.RequireProgressBy)
	}
	c.health("new1", true)
	d, _ = c.deployment()
	if due := c.Snapshot().ProgressDue(d); due != 0 {
		t.Errorf("a deployment that waits for its promotion is due at %d", due)
	}
	c.ended(DeploymentRunning, DeploymentDescNeedsPromotion)
	res := c.promote()
	if res.EvalID == "" || c.Snapshot().Eval(nil, res.EvalID) == nil {
		t.Errorf("the promotion gave %+v", res)
	}
	c.ended(DeploymentRunning, DeploymentDescRunning)
	for _, id := range []string{"new0", "new1"} {
		if a := c.Snapshot().Alloc(nil, id); a.Canary() || !*a.DeploymentStatus.Healthy {
			t.Errorf("%s after the promotion: %+v", id, a.DeploymentStatus)
		}
	}
	if d, g := c.deployment(); !g.Promoted || c.Snapshot().ProgressDue(d) == 0 {
		t.Errorf("after the promotion: %+v", g)
	}
	c.refuses(&PromoteDeployment{DeploymentID: c.d}, "no canaries to promote")
	c.place("new2", 2, 1, false)
	c.health("new2", true)
	c.ended(DeploymentSuccessful, DeploymentDescSuccessful)
	c.refuses(&PromoteDeployment{DeploymentID: c.d}, "can't promote terminal deployment")
	if v := c.Snapshot().JobVersion(nil, c.key, 1); !v.Stable {
		t.Error("the version is not stable")
	}
}

// With as many canaries as allocations the promotion is all that is left to do; an evaluation ends the old ones.
func TestAutoPromoteAll(t *testing.T) {
	c := newTrial(t, 2, 2, func(u *UpdateStrategy) { u.AutoPromote = u.Canary > 0 })
	c.ended(DeploymentRunning, DeploymentDescAutoPromotion)
	c.must(&UpdateDeployment{Update: &DeploymentStatusUpdate{c.d, DeploymentPaused, DeploymentDescPaused}})
	c.health("new0", true)
	c.health("new1", true)
	if _, g := c.deployment(); g.Promoted {
		t.Error("a paused deployment was promoted")
	}
	before := len(c.Snapshot().OpenEvalsByJob(c.key))
	c.must(&UpdateDeployment{Update: &DeploymentStatusUpdate{c.d, DeploymentRunning, DeploymentDescRunning}})
	c.ended(DeploymentSuccessful, DeploymentDescSuccessful)
	if got := len(c.Snapshot().OpenEvalsByJob(c.key)); got != before+1 {
		t.Errorf("%d open evaluations, want %d", got, before+1)
	}
}

// A healthy canary that is lost starts the clock again, which had stood.
func TestLostCanaryRestartsClock(t *testing.T) {
	c := newTrial(t, 2, 1)
	c.health("new0", true)
	_, g := c.deployment()
	was := g.RequireProgressBy
	c.now += int64(time.Hour)
	c.must(&UpdateAllocs{Allocs: []*Allocation{{ID: "new0", ClientStatus: AllocClientFailed}}})
	d, g := c.deployment()
	if due := c.Snapshot().ProgressDue(d); due < was.Add(time.Hour) || g.HealthyAllocs != 0 {
		t.Errorf("due at %d, was %d; %+v", due, was, g)
	}
}

func TestAutoRevert(t *testing.T) {
	revert := func(u *UpdateStrategy) { u.AutoRevert = true }
	fail := func(c *trial) Result {
		return c.must(&UpdateDeployment{Update: &DeploymentStatusUpdate{c.d, DeploymentFailed, DeploymentDescFailedByUser}, EvalID: c.id()})
	}
	c := newTrial(t, 2, 1, revert)
	res := fail(c)
	c.ended(DeploymentFailed, DeploymentDescFailedByUser+" - rolling back to job version 0")
	j := c.Snapshot().Job(nil, c.key)
	if j.Version != 2 || j.Stable || string(j.TaskGroups[0].Tasks[0].Config) != `{"command":"v1"}` || res.Reverted == nil || *res.Reverted != 0 {
		t.Errorf("reverted to version %d, stable %t, %s; %+v", j.Version, j.Stable, j.TaskGroups[0].Tasks[0].Config, res)
	}
	if e := c.Snapshot().Eval(nil, res.EvalID); e == nil || e.JobModifyIndex != j.JobModifyIndex {
		t.Errorf("evaluation %+v of %d", e, j.JobModifyIndex)
	}
	// What fails again has failed for good.
	c.deploy(2, 0)
	if res := fail(c); res.Reverted != nil {
		t.Errorf("reverted again: %+v", res)
	}
	c.ended(DeploymentFailed, DeploymentDescFailedByUser+" - not rolling back to stable job version 0 as current job has same specification")
	if j := c.Snapshot().Job(nil, c.key); j.Version != 2 {
		t.Errorf("version %d", j.Version)
	}

	// Without a deadline for progress the first unhealthy one fails it. A job that was never stable stays.
	c = newTrial(t, 1, 1, revert, func(u *UpdateStrategy) { u.ProgressDeadline = 0 })
	c.must(&SetJobStability{Namespace: DefaultNamespace, JobID: "web", Version: 0})
	c.health("new0", false)
	c.ended(DeploymentFailed, DeploymentDescFailedAllocs+" - no stable job version to auto revert to")

	// A newer version is there already: it is left alone.
	c = newTrial(t, 1, 1, revert)
	c.must(&RegisterJob{Job: c.version("v3", 1, 1, revert), EvalID: c.id()})
	fail(c)
	c.ended(DeploymentFailed, DeploymentDescFailedByUser)
	c.refuses(&PromoteDeployment{DeploymentID: c.d}, "can't promote terminal deployment")
}

// A job whose model follows an alias is taken back to the model that it had.
func TestAutoRevertKeepsModel(t *testing.T) {
	c := newTrial(t, 1, 0)
	push := func(digest string) {
		c.must(&CreateModelVersion{Version: &ModelVersion{Model: "m", Digest: "sha256:" + strings.Repeat(digest, 64), Size: 1}})
	}
	alias := func(v uint64) { c.must(&SetAlias{Model: "m", Alias: "prod", Version: v}) }
	push("1")
	push("2")
	alias(1)
	serve := c.version("v", 1, 0, func(u *UpdateStrategy) { u.AutoRevert = true })
	serve.ID, serve.TaskGroups[0].Tasks[0].Model = "serve", &ModelRef{Reference: "m@prod", Name: "m", Alias: "prod"}
	serve.TaskGroups[0].Tasks[0].Config = []byte(`{"model":"m@prod","threads":4.50}`)
	c.key = JobKey{DefaultNamespace, "serve"}
	c.must(&RegisterJob{Job: serve, EvalID: c.id()})
	c.must(&SetJobStability{Namespace: DefaultNamespace, JobID: "serve", Stable: true})
	alias(2)
	c.deploy(1, 0)
	c.must(&UpdateDeployment{Update: &DeploymentStatusUpdate{c.d, DeploymentFailed, DeploymentDescFailedByUser}})
	task := c.Snapshot().Job(nil, c.key).TaskGroups[0].Tasks[0]
	if task.Model.Version != 1 || task.Model.Alias != "" || string(task.Config) != `{"model":"m:1","threads":4.50}` {
		t.Errorf("taken back to %+v, %s", task.Model, task.Config)
	}
	c.deploy(1, 0)
	c.must(&UpdateDeployment{Update: &DeploymentStatusUpdate{c.d, DeploymentFailed, DeploymentDescFailedByUser}})
	if j := c.Snapshot().Job(nil, c.key); j.Version != 2 {
		t.Errorf("taken back again: version %d", j.Version)
	}
}

func TestSetHealth(t *testing.T) {
	c := newTrial(t, 2, 1, func(u *UpdateStrategy) { u.HealthCheck = "manual" })
	update := &DeploymentStatusUpdate{DeploymentID: c.d}
	c.refuses(&UpdateDeployment{Update: update, Healthy: []string{"nope", "old0"}}, `unknown alloc "nope"`)
	c.must(&UpdateDeployment{Update: update, Healthy: []string{"new0"}, EvalID: c.id()})
	if _, g := c.deployment(); g.HealthyAllocs != 1 {
		t.Errorf("%+v", g)
	}
	c.must(&UpdateDeployment{Update: update, Unhealthy: []string{"new0"}, EvalID: c.id()})
	if _, g := c.deployment(); g.HealthyAllocs != 0 || g.UnhealthyAllocs != 1 {
		t.Errorf("%+v", g)
	}
	c.refuses(&PromoteDeployment{DeploymentID: c.d}, "has 0/1 healthy allocations")
}

// What takes the place of the old version while canaries run is of the old version; older rules did not know that.
func TestPlaceOlderVersion(t *testing.T) {
	c := newTrial(t, 1, 1)
	c.plan(&Plan{Place: []*Allocation{c.alloc("again", 0)}})
	if got := c.Snapshot().Alloc(nil, "again"); got.JobVersion != 0 {
		t.Errorf("placed version %d", got.JobVersion)
	}
	e := c.Snapshot().EvalsByJob(nil, c.key)[0]
	open := *e
	open.ID, open.Status = c.id(), EvalStatusPending
	c.must(&UpdateEvals{Evals: []*Evaluation{&open}})
	gone := c.alloc("gone", 0)
	gone.JobVersion = 9
	res := c.must(&ApplyPlans{Plans: []*Plan{{EvalID: open.ID, Namespace: c.key.Namespace, JobID: c.key.ID, JobVersion: 1, Place: []*Allocation{gone}}}})
	if !res.Plans[0].Stale {
		t.Errorf("a plan of a version that is not kept: %+v", res.Plans[0])
	}
}

func TestVersionTags(t *testing.T) {
	c := newTrial(t, 1, 0)
	zero := uint64(0)
	tag := func(name string, v *uint64) *TagVersion {
		return &TagVersion{Namespace: DefaultNamespace, JobID: "web", Name: name, Description: "why", Version: v}
	}
	c.must(tag("gold", &zero))
	c.must(tag("newest", nil))
	c.refuses(tag("gold", nil), `tag "gold" already exists on a different version of job "web": version 0`)
	c.refuses(tag("", nil), "needs a name")
	nine := uint64(9)
	c.refuses(tag("x", &nine), "at version 9 not found")
	c.refuses(&TagVersion{Namespace: DefaultNamespace, JobID: "nope", Name: "x"}, `job "nope" not found`)
	if j := c.Snapshot().Job(nil, c.key); j.VersionTag == nil || j.VersionTag.Name != "newest" || j.VersionTag.TaggedTime == 0 {
		t.Errorf("current version has %+v", j.VersionTag)
	}
	for i := range 2 * MaxJobVersions {
		c.must(&RegisterJob{Job: c.version(fmt.Sprintf("w%d", i), 1, 0)})
		if j := c.Snapshot().Job(nil, c.key); j.VersionTag != nil {
			t.Fatalf("a new version has the tag %+v", j.VersionTag)
		}
	}
	v := c.Snapshot().JobVersionByTag(nil, c.key, "newest")
	if v == nil || v.Version != 1 {
		t.Fatalf("the tagged version is not kept: %+v", v)
	}
	c.must(&Reap{Versions: []JobVersionKey{{DefaultNamespace, "web", 1}}})
	c.must(&TagVersion{Namespace: DefaultNamespace, JobID: "web", Name: "newest", Unset: true})
	c.refuses(&TagVersion{Namespace: DefaultNamespace, JobID: "web", Name: "newest", Unset: true}, `tag "newest" not found on job "web"`)
	c.must(&Reap{Versions: []JobVersionKey{{DefaultNamespace, "web", 1}}})
	if v := c.Snapshot().JobVersion(nil, c.key, 1); v != nil {
		t.Error("a version without a tag was not reaped")
	}
	for i := 1; i < MaxVersionTags; i++ {
		c.must(&RegisterJob{Job: c.version(fmt.Sprintf("t%d", i), 1, 0)})
		c.must(tag(fmt.Sprintf("t%d", i), nil))
	}
	c.must(&RegisterJob{Job: c.version("last", 1, 0)})
	c.refuses(tag("one-more", nil), "tagged versions, as many as may be")
}

// TestNothingToPromote: what was to be tried beside an old version came whole, since nothing was left of that.
func TestNothingToPromote(t *testing.T) {
	c := newTrial(t, 2, 1)
	c.must(&RegisterJob{Job: c.version("v3", 2, 1), EvalID: c.id()})
	c.deploy(2, 1)
	for i := range 2 {
		id := fmt.Sprint("whole", i)
		c.place(id, i, 2, false)
		c.health(id, true)
	}
	c.ended(DeploymentSuccessful, DeploymentDescSuccessful)
}
