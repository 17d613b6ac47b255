package cluster

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// harness applies commands with rising indexes and checks the state after each.
type harness struct {
	testing.TB
	*State
	index  uint64
	now    int64
	ids    int
	encode func(Command) []byte
}

func newHarness(tb testing.TB) *harness {
	return &harness{TB: tb, State: NewState(), now: 1e18, encode: EncodeCommand}
}

func (h *harness) id() string {
	h.ids++
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", h.ids, h.ids)
}

func (h *harness) do(c Command) Result {
	h.Helper()
	h.now += int64(time.Second)
	*c.stamp() = Stamp{RequestID: h.id(), Time: h.now}
	h.index++
	res, err := h.Apply(h.index, h.encode(c))
	if err != nil {
		h.Fatalf("apply %T: %v", c, err)
	}
	if err := h.Snapshot().Check(); err != nil {
		h.Fatalf("after %T: %v", c, err)
	}
	for id, u := range h.uses {
		anew := NewNodeUse(u.node)
		for _, a := range h.Snapshot().AllocsHolding(nil, id) {
			anew.Add(a)
		}
		if len(u.faults) > 0 || !anew.equal(u) {
			h.Fatalf("after %T: use of node %s is remembered as %+v and is %+v", c, id, u, anew)
		}
	}
	return res
}

func (h *harness) must(c Command) Result {
	h.Helper()
	res := h.do(c)
	if res.Err != nil {
		h.Fatalf("%T refused: %v", c, res.Err)
	}
	return res
}

func testNode(id string) *Node {
	return &Node{
		ID: id, Name: "n-" + id[:8], Datacenter: "dc1", NodePool: DefaultNodePool,
		NodeResources: &NodeResources{
			Cpu: NodeCPU{CpuShares: 4000}, Memory: NodeMemory{8192}, Disk: NodeDisk{10000},
			Devices: []*NodeDeviceResource{{
				Vendor: "nvidia", Type: "gpu", Name: "H100",
				Instances: []*NodeDevice{{ID: "GPU-0-" + id[:8], Healthy: true}, {ID: "GPU-1-" + id[:8], Healthy: true}},
			}},
			MinDynamicPort: 20000, MaxDynamicPort: 32000,
		},
	}
}

func testJob(id string, count int) *Job {
	return &Job{
		Region: "global", Namespace: DefaultNamespace, ID: id, Name: id, Type: JobTypeService,
		Priority: DefaultPriority, Datacenters: []string{"*"}, NodePool: DefaultNodePool,
		TaskGroups: []*TaskGroup{{
			Name: "web", Count: count, Update: &UpdateStrategy{MaxParallel: 1, ProgressDeadline: time.Minute},
			Tasks: []*Task{{
				Name: "x", Driver: "raw_exec", Config: json.RawMessage(`{"command":"/bin/sleep"}`),
				Resources: &Resources{CPU: 100, MemoryMB: 64},
			}},
		}},
	}
}

func testAlloc(h *harness, e *Evaluation, j *Job, node *Node, devices ...string) *Allocation {
	a := &Allocation{
		ID: h.id(), Namespace: j.Namespace, EvalID: e.ID, Name: j.ID + ".web[0]", NodeID: node.ID, NodeName: node.Name,
		JobID: j.ID, JobVersion: j.Version, TaskGroup: "web", DesiredStatus: AllocDesiredRun,
		AllocatedResources: &AllocatedResources{Tasks: map[string]*AllocatedTaskResources{
			"x": {Cpu: AllocatedCPU{100}, Memory: AllocatedMemory{MemoryMB: 64}},
		}},
	}
	if devices != nil {
		a.AllocatedResources.Tasks["x"].Devices = []*AllocatedDevice{{Vendor: "nvidia", Type: "gpu", Name: "H100", DeviceIDs: devices}}
	}
	return a
}

func answered(e *Evaluation) *Evaluation {
	c := *e
	c.Status = EvalStatusComplete
	return &c
}

func TestRegisterVersionsAndEnforceIndex(t *testing.T) {
	h := newHarness(t)
	first := h.must(&RegisterJob{Job: testJob("a", 1), EvalID: h.id(), Submission: &JobSubmission{Source: "job {}", Format: "hcl2"}})
	same := h.must(&RegisterJob{Job: testJob("a", 1), EvalID: h.id()})
	if same.JobModifyIndex != first.JobModifyIndex || same.Version != 0 || same.EvalID == first.EvalID {
		t.Errorf("identical registration: %+v after %+v, want the same version and a new evaluation", same, first)
	}
	if s := h.Snapshot().Submission(nil, JobKey{"default", "a"}, 0); s == nil || s.Source != "job {}" {
		t.Errorf("submission = %+v", s)
	}
	for i := 2; i < 12; i++ {
		h.must(&RegisterJob{Job: testJob("a", i), EvalID: h.id()})
	}
	versions := h.Snapshot().JobVersions(nil, JobKey{"default", "a"})
	if len(versions) != MaxJobVersions || versions[0].Version != 10 {
		t.Errorf("%d versions kept, newest %d; want %d and 10", len(versions), versions[0].Version, MaxJobVersions)
	}
	res := h.do(&RegisterJob{Job: testJob("a", 1), EnforceIndex: true, JobModifyIndex: 1})
	if CodeOf(res.Err) != CodeConflict || !strings.HasPrefix(res.Err.Text, "Enforcing job modify index 1: job exists with conflicting job modify index: ") {
		t.Errorf("conflicting index gave %v", res.Err)
	}
	if res := h.do(&RegisterJob{Job: testJob("b", 1), EnforceIndex: true, JobModifyIndex: 7}); CodeOf(res.Err) != CodeConflict {
		t.Errorf("missing job gave %v", res.Err)
	}
}

func TestRequestIDAppliesOnce(t *testing.T) {
	h := newHarness(t)
	c := &RegisterJob{Job: testJob("a", 1), EvalID: "e1", Stamp: Stamp{RequestID: "r1", Time: 5}}
	entry := EncodeCommand(c)
	one, err1 := h.Apply(7, entry)
	two, err2 := h.Apply(9, entry)
	if err1 != nil || err2 != nil || fmt.Sprint(one) != fmt.Sprint(two) || one.Index != 7 {
		t.Fatalf("first %+v %v, second %+v %v", one, err1, two, err2)
	}
	if i := h.Snapshot().Index(nil); i != 7 {
		t.Errorf("the second application moved the index to %d", i)
	}
}

func TestUnknownKindStops(t *testing.T) {
	if _, err := NewState().Apply(1, []byte{250, 0x80}); err == nil || !strings.Contains(err.Error(), "kind 250") {
		t.Fatalf("error = %v", err)
	}
}

// place registers a job and commits one allocation of it.
func (h *harness) place(j *Job, node *Node, d *Deployment, devices ...string) (*Allocation, PlanResult) {
	h.Helper()
	res := h.must(&RegisterJob{Job: j, EvalID: h.id()})
	snap := h.Snapshot()
	j, e := snap.Job(nil, j.Key()), snap.Eval(nil, res.EvalID)
	a := testAlloc(h, e, j, node, devices...)
	if d != nil {
		a.DeploymentID = d.ID
	}
	r := h.must(&ApplyPlans{Plans: []*Plan{{
		EvalID: e.ID, EvalEpoch: e.ModifyIndex, Namespace: j.Namespace, JobID: j.ID,
		JobVersion: j.Version, Place: []*Allocation{a}, Deployment: d, Evals: []*Evaluation{answered(e)},
	}}})
	return a, r.Plans[0]
}

func TestPlanNeverGivesADeviceTwice(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	gpu := n.NodeResources.Devices[0].Instances[0].ID
	if _, r := h.place(testJob("a", 1), n, nil, gpu); r.Refused != nil {
		t.Fatalf("first: %+v", r)
	}
	b, r := h.place(testJob("b", 1), n, nil, gpu)
	if len(r.Refused) != 1 || h.Snapshot().Alloc(nil, b.ID) != nil {
		t.Fatalf("second: %+v", r)
	}
	if e := h.Snapshot().Eval(nil, b.EvalID); e.Status != EvalStatusPending {
		t.Errorf("evaluation of the refused plan is %s, want pending", e.Status)
	}
	if _, r := h.place(testJob("c", 1), n, nil, "GPU-unknown"); len(r.Refused) != 1 {
		t.Errorf("a device that the node lacks was given: %+v", r)
	}
}

func TestPurgedJobKeepsWhatStillRuns(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	old := testJob("a", 1)
	a, _ := h.place(old, n, nil)
	h.must(&DeregisterJob{Namespace: "default", JobID: "a", Purge: true, EvalID: h.id()})
	again := testJob("a", 1)
	again.TaskGroups[0].Tasks[0].Config = json.RawMessage(`{"command":"/bin/true"}`)
	h.must(&RegisterJob{Job: again, EvalID: h.id()})
	live := h.Snapshot().Alloc(nil, a.ID)
	if v := h.Snapshot().JobVersion(nil, live.JobKey(), live.JobVersion); v == nil || string(v.TaskGroups[0].Tasks[0].Config) != string(old.TaskGroups[0].Tasks[0].Config) {
		t.Errorf("the version that a live allocation runs became %+v", v)
	}
}

func TestDeploymentFollowsHealth(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	d := &Deployment{
		ID: h.id(), Namespace: "default", JobID: "a", Status: DeploymentRunning,
		TaskGroups: map[string]*DeploymentState{"web": {DesiredTotal: 1, ProgressDeadline: time.Minute}},
	}
	a, _ := h.place(testJob("a", 1), n, d)
	yes := true
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{
		ID: a.ID, ClientStatus: AllocClientRunning,
		DeploymentStatus: &AllocDeploymentStatus{Healthy: &yes},
	}}})
	s := h.Snapshot()
	if got := s.Deployment(nil, d.ID); got.Status != DeploymentSuccessful || got.TaskGroups["web"].HealthyAllocs != 1 {
		t.Fatalf("deployment: %+v %+v", got, got.TaskGroups["web"])
	}
	if j := s.Job(nil, a.JobKey()); !j.Stable || j.Status != JobStatusRunning {
		t.Errorf("job stable=%v status=%s", j.Stable, j.Status)
	}
	if g := s.Summary(nil, a.JobKey()).Summary["web"]; g != (TaskGroupSummary{Running: 1}) {
		t.Errorf("summary %+v", g)
	}
	before := len(s.EvalsByJob(nil, a.JobKey()))
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: AllocClientFailed}}})
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: AllocClientRunning}}})
	s = h.Snapshot()
	if got := s.Alloc(nil, a.ID).ClientStatus; got != AllocClientFailed {
		t.Errorf("a finished allocation came back as %s", got)
	}
	if evals := s.EvalsByJob(nil, a.JobKey()); len(evals) != before+1 {
		t.Errorf("%d evaluations after the failure, want %d", len(evals), before+1)
	}
}

// TestRulesOfALog: silent nodes of one command evaluate a job once, and a node that is
// back evaluates nothing of what runs on; a log from before that makes what it made.
func TestRulesOfALog(t *testing.T) {
	for _, test := range []struct{ rules, silent, back int }{{0, 2, 1}, {CurrentRules, 1, 0}} {
		h := newHarness(t)
		h.encode = func(c Command) []byte { return encodeCommand(c, uint64(test.rules)) }
		nodes := []*Node{testNode(h.id()), testNode(h.id())}
		var updates []NodeStatusUpdate
		var key JobKey
		for _, n := range nodes {
			h.must(&RegisterNode{Node: n})
			a, _ := h.place(testJob("a", 2), n, nil)
			updates, key = append(updates, NodeStatusUpdate{NodeID: n.ID, Status: NodeStatusDisconnected}), a.JobKey()
		}
		evals := func() int { return len(h.Snapshot().EvalsByJob(nil, key)) }
		before := evals()
		h.must(&UpdateNodeStatus{Updates: updates})
		if got := evals() - before; got != test.silent {
			t.Errorf("rules %d: %d evaluations for two silent nodes, want %d", test.rules, got, test.silent)
		}
		before = evals()
		h.must(&RegisterNode{Node: testNode(nodes[0].ID)})
		if got := evals() - before; got != test.back {
			t.Errorf("rules %d: %d evaluations for a node that is back, want %d", test.rules, got, test.back)
		}
	}
}

// TestPreferencesNeedRules: a job keeps its affinities and spreads, and a change of one
// is another version; by rules from before they are lost, as they are on servers of then.
func TestPreferencesNeedRules(t *testing.T) {
	for _, test := range []struct {
		rules uint64
		keeps bool
	}{{rulesPreferences - 1, false}, {CurrentRules, true}} {
		h := newHarness(t)
		h.encode = func(c Command) []byte { // encodeCommand would give the job the rules that it needs
			c.stamp().Rules = test.rules
			return marshal([]byte{byte(c.kind())}, c)
		}
		job := func(change func(*Job, *TaskGroup)) *Job {
			j := testJob("a", 1)
			j.TaskGroups[0].Tasks[0].Resources = &Resources{CPU: 100, MemoryMB: 10, Devices: []*RequestedDevice{{Name: "gpu", Count: 1}}}
			if change != nil {
				change(j, j.TaskGroups[0])
			}
			return j
		}
		affinity := []*Affinity{{LTarget: "${node.class}", Operand: "=", RTarget: "a", Weight: -5}}
		spread := []*Spread{{Attribute: "${node.class}", Weight: 5, SpreadTarget: []*SpreadTarget{{Value: "a", Percent: 5}}}}
		h.must(&RegisterJob{Job: job(nil)})
		for i, change := range []func(*Job, *TaskGroup){
			func(j *Job, _ *TaskGroup) { j.Affinities = affinity },
			func(j *Job, _ *TaskGroup) { j.Spreads = spread },
			func(_ *Job, g *TaskGroup) { g.Affinities = affinity },
			func(_ *Job, g *TaskGroup) { g.Spreads = spread },
			func(_ *Job, g *TaskGroup) { g.Tasks[0].Affinities = affinity },
			func(_ *Job, g *TaskGroup) { g.Tasks[0].Resources.Devices[0].Affinities = affinity },
		} {
			h.must(&RegisterJob{Job: job(change)})
			j := h.Snapshot().Job(nil, job(nil).Key())
			version := uint64(0)
			if test.keeps {
				version = uint64(i) + 1
			}
			if j.prefers() != test.keeps || j.Version != version {
				t.Errorf("rules %d, change %d: version %d, preferences %v", test.rules, i, j.Version, j.prefers())
			}
		}
	}
}

// TestHealthIsEvaluatedWhileThereIsMoreToPlace: in a rollout each healthy allocation
// asks for the next; when all are there, their health is no reason to plan.
func TestHealthIsEvaluatedWhileThereIsMoreToPlace(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	d := &Deployment{
		ID: h.id(), Namespace: "default", JobID: "a", Status: DeploymentRunning,
		TaskGroups: map[string]*DeploymentState{"web": {DesiredTotal: 3, ProgressDeadline: time.Minute}},
	}
	first, _ := h.place(testJob("a", 3), n, d)
	place := func() *Allocation {
		t.Helper()
		res := h.must(&RegisterJob{Job: testJob("a", 3), EvalID: h.id()})
		e := h.Snapshot().Eval(nil, res.EvalID)
		a := testAlloc(h, e, h.Snapshot().Job(nil, first.JobKey()), n)
		a.DeploymentID = d.ID
		h.must(&ApplyPlans{Plans: []*Plan{{
			EvalID: e.ID, EvalEpoch: e.ModifyIndex, Namespace: a.Namespace, JobID: a.JobID, Place: []*Allocation{a}, Evals: []*Evaluation{answered(e)},
		}}})
		return a
	}
	yes := true
	healthy := func(a *Allocation) (evals int) {
		before := len(h.Snapshot().EvalsByJob(nil, a.JobKey()))
		h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{
			ID: a.ID, ClientStatus: AllocClientRunning, DeploymentStatus: &AllocDeploymentStatus{Healthy: &yes},
		}}})
		return len(h.Snapshot().EvalsByJob(nil, a.JobKey())) - before
	}
	if got := healthy(first); got != 1 {
		t.Errorf("%d evaluations for the first healthy one of a rollout, want 1", got)
	}
	second, third := place(), place()
	if got := healthy(second); got != 0 {
		t.Errorf("%d evaluations for one of a group that is all there, want none", got)
	}
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: second.ID, ClientStatus: AllocClientFailed}}})
	if got := healthy(third); got != 1 {
		t.Errorf("%d evaluations for one of a group that lacks one, want 1", got)
	}
	fourth := place()
	if got := healthy(fourth); got != 0 || h.Snapshot().Deployment(nil, d.ID).Status != DeploymentSuccessful {
		t.Errorf("%d evaluations, and the deployment %+v", got, h.Snapshot().Deployment(nil, d.ID))
	}
}

func TestModelsArePinned(t *testing.T) {
	h := newHarness(t)
	digest := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	job := func() *Job {
		j := testJob("m", 1)
		j.TaskGroups[0].Tasks[0].Model = &ModelRef{Reference: "fashion@production", Name: "fashion", Alias: "production"}
		return j
	}
	if res := h.do(&RegisterJob{Job: job(), EvalID: h.id()}); CodeOf(res.Err) != CodeUnknownModel ||
		!strings.Contains(res.Err.Text, `group.web.task.x.config.model: unknown model "fashion"`) {
		t.Fatalf("unknown model: %v", res.Err)
	}
	for i, c := range []string{"a", "b", "a"} {
		res := h.must(&CreateModelVersion{Version: &ModelVersion{Model: "fashion", Digest: digest(c)}})
		if want := []uint64{1, 2, 1}[i]; res.Version != want {
			t.Errorf("push %d made version %d, want %d", i, res.Version, want)
		}
	}
	h.must(&SetAlias{Model: "fashion", Alias: "production", Version: 1})
	h.must(&RegisterJob{Job: job(), EvalID: h.id()})
	h.must(&SetAlias{Model: "fashion", Alias: "production", Version: 2})
	j := h.Snapshot().Job(nil, JobKey{"default", "m"})
	if r := j.TaskGroups[0].Tasks[0].Model; j.Version != 1 || r.Version != 2 || r.Digest != digest("b") {
		t.Errorf("after the alias moved: job version %d, model %+v", j.Version, r)
	}
	if old := h.Snapshot().JobVersion(nil, j.Key(), 0); old.TaskGroups[0].Tasks[0].Model.Digest != digest("a") {
		t.Errorf("the older job version follows the alias")
	}
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	a, _ := h.place(job(), n, nil)
	serving := func() *Serving { return h.Snapshot().Alloc(nil, a.ID).Serving }
	if s := serving(); s == nil || s.Model != "fashion" || s.Version != 2 || s.Ready {
		t.Errorf("a placed allocation is to serve %+v", s)
	}
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{
		ID: a.ID, ClientStatus: AllocClientRunning,
		Serving: &Serving{Task: "x", Model: "fashion", Version: 2, Address: "127.0.0.1:1", Ready: true},
	}}})
	if s := serving(); !s.Ready || s.Address == "" {
		t.Errorf("serving %+v", s)
	}
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: AllocClientPending}}})
	if s := serving(); s == nil || s.Ready || s.Address != "" {
		t.Errorf("while the node says nothing: %+v", s)
	}
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: AllocClientFailed}}})
	if s := serving(); s != nil {
		t.Errorf("a finished allocation serves %+v", s)
	}
	if res := h.do(&SetAlias{Model: "fashion", Alias: "production"}); CodeOf(res.Err) != CodeConflict {
		t.Errorf("removing a followed alias: %v", res.Err)
	}
}

func TestRefusedCommandChangesNothing(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterNode{Node: testNode(h.id())})
	before := dump(t, h.State, TableResults, TableIndex)
	for _, c := range []Command{
		&RegisterNode{Node: &Node{ID: "x"}}, &UpdateEligibility{NodeID: "nope"}, &UpdateDrain{NodeID: "nope"},
		&DeregisterNode{NodeID: "nope"}, &RegisterJob{Job: &Job{ID: "x"}}, &UpdateDeployment{Update: &DeploymentStatusUpdate{}},
		&SetJobStability{JobID: "nope"}, &CreateModelVersion{Version: &ModelVersion{Model: "-"}}, &SetAlias{Model: "nope"},
	} {
		if res := h.do(c); res.Err == nil {
			t.Errorf("%T was not refused", c)
		}
	}
	if after := dump(t, h.State, TableResults, TableIndex); after != before {
		t.Errorf("state changed:\n%s\nwas\n%s", after, before)
	}
}

// dump renders every record, tables in skip left out.
func dump(t testing.TB, s *State, skip ...string) string { return dumpOf(t, s.Snapshot(), skip...) }

func dumpOf(t testing.TB, s *Snapshot, skip ...string) string {
	var b bytes.Buffer
	err := s.Records(func(tab *Table, key string, rec any) error {
		if !strings.Contains(strings.Join(skip, " "), tab.Name) {
			fmt.Fprintf(&b, "%s %q %x\n", tab.Name, key, Marshal(rec))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestRandomCommands drives the state with a seeded mix of commands, checks every
// invariant after each step, and at the end that a replica that applies the same
// log, and one restored from a snapshot, hold the same bytes.
func TestRandomCommands(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("RXVISION_TEST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("RXVISION_TEST_SEED=%d", seed)
	h := newHarness(t)
	log := randomLog(h, rand.New(rand.NewPCG(seed, 1)))
	want := dump(t, h.State)
	replica := NewState()
	for i, entry := range log {
		if _, err := replica.Apply(uint64(i+1), entry); err != nil {
			t.Fatal(err)
		}
	}
	if dump(t, replica) != want {
		t.Error("a replica that applied the same log holds another state")
	}
	restore := NewRestore()
	err := h.Snapshot().Records(func(tab *Table, _ string, rec any) error { return restore.Add(tab, Marshal(rec)) })
	if err != nil {
		t.Fatal(err)
	}
	restored, err := restore.Done()
	if err != nil {
		t.Fatal(err)
	}
	if dump(t, restored) != want {
		t.Error("the restored state differs")
	}
}

// randomLog applies a random mix of commands and gives their entries; the first has index 1.
func randomLog(h *harness, r *rand.Rand) (log [][]byte) {
	do := func(c Command) Result {
		res := h.do(c)
		log = append(log, EncodeCommand(c))
		return res
	}
	var nodes []*Node
	for range 4 {
		n := testNode(h.id())
		nodes = append(nodes, n)
		do(&RegisterNode{Node: n})
	}
	yes, no := true, false
	for range 600 {
		key := JobKey{"default", fmt.Sprintf("job-%d", r.IntN(6))}
		snap := h.Snapshot()
		allocs := snap.Allocs(nil, "")
		key.Namespace = []string{"default", "team-0", "team-1"}[r.IntN(3)]
		switch r.IntN(19) {
		case 18:
			do(randomDevice(r, nodes[r.IntN(len(nodes))]))
		case 0, 1:
			j := testJob(key.ID, 1+r.IntN(3))
			if j.Namespace = key.Namespace; r.IntN(2) == 0 {
				j.TaskGroups[0].Preempt = &PreemptPolicy{Reclaim: true}
			}
			do(&RegisterJob{Job: j, EvalID: h.id()})
		case 15, 16:
			do(randomTenants(r))
		case 2:
			do(&DeregisterJob{Namespace: key.Namespace, JobID: key.ID, Purge: r.IntN(2) == 0, EvalID: h.id()})
		case 3, 4, 5:
			for _, e := range snap.Evals(nil, "") {
				if e.Status != EvalStatusPending {
					continue
				}
				p := &Plan{EvalID: e.ID, EvalEpoch: e.ModifyIndex, Namespace: e.Namespace, JobID: e.JobID, Evals: []*Evaluation{answered(e)}}
				p.Evals[0].SnapshotIndex = snap.Index(nil)
				for _, other := range snap.EvalsByJob(nil, e.JobKey()) {
					if r.IntN(2) == 0 {
						p.Answers = append(p.Answers, other.ID)
					}
				}
				if j := snap.Job(nil, e.JobKey()); j != nil && !j.Stop {
					p.JobVersion = j.Version
					n := nodes[r.IntN(len(nodes))]
					d := &Deployment{
						ID: h.id(), Namespace: j.Namespace, JobID: j.ID, JobVersion: j.Version, Status: DeploymentRunning,
						JobCreateIndex: j.CreateIndex,
						TaskGroups: map[string]*DeploymentState{"web": {
							DesiredTotal: 1, DesiredCanaries: r.IntN(2), AutoRevert: r.IntN(2) == 0, AutoPromote: r.IntN(3) == 0,
						}},
					}
					a := testAlloc(h, e, j, n, n.NodeResources.Devices[0].Instances[r.IntN(2)].ID)
					a.DeploymentID, a.DeploymentStatus = d.ID, nil
					if d.TaskGroups["web"].DesiredCanaries > 0 {
						a.DeploymentStatus = &AllocDeploymentStatus{Canary: true}
					}
					p.Deployment, p.Place = d, []*Allocation{a}
				}
				for _, a := range snap.AllocsByJob(nil, e.JobKey()) {
					if r.IntN(2) == 0 {
						p.Stop = append(p.Stop, &AllocStop{AllocID: a.ID, DesiredStatus: AllocDesiredStop})
					}
				}
				do(&ApplyPlans{Plans: []*Plan{p}})
				break
			}
		case 6, 7:
			if len(allocs) == 0 {
				continue
			}
			a := allocs[r.IntN(len(allocs))]
			u := &Allocation{ID: a.ID, Revision: r.Uint64N(20), ClientStatus: []string{AllocClientRunning, AllocClientFailed, AllocClientComplete}[r.IntN(3)]}
			if r.IntN(2) == 0 {
				u.DeploymentStatus = &AllocDeploymentStatus{Healthy: []*bool{&yes, &no}[r.IntN(2)]}
			}
			do(&UpdateAllocs{NodeID: a.NodeID, Allocs: []*Allocation{u}})
		case 8:
			n := nodes[r.IntN(len(nodes))]
			do(&UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: n.ID, Status: []string{NodeStatusDown, NodeStatusReady, NodeStatusDisconnected}[r.IntN(3)]}}})
			server := &Server{ID: fmt.Sprintf("server-%d", r.IntN(3)), RaftAddr: "127.0.0.1:7648", Version: fmt.Sprint(r.IntN(2))}
			switch r.IntN(4) {
			case 0:
				do(&RegisterServer{Server: server})
			case 1:
				do(&RemoveServer{ID: server.ID, Left: r.IntN(2) == 0})
			case 2:
				do(&SetAutopilotConfig{Config: DefaultAutopilotConfig(), CheckIndex: r.IntN(2) == 0})
			case 3:
				do(&SetClusterMeta{ClusterID: server.ID})
			}
			if r.IntN(3) == 0 {
				do(&SetFleetHold{Hold: []*FleetHold{nil, {Nodes: 2, Of: 4, Reason: "test"}}[r.IntN(2)]})
			}
		case 9:
			reap := &Reap{Jobs: []JobKey{key}, Nodes: []string{nodes[r.IntN(len(nodes))].ID}}
			for range 3 {
				reap.Versions = append(reap.Versions, JobVersionKey{key.Namespace, key.ID, r.Uint64N(20)})
			}
			for _, a := range allocs {
				if r.IntN(3) == 0 {
					reap.Allocs = append(reap.Allocs, a.ID)
				}
			}
			for _, e := range snap.Evals(nil, "") {
				if r.IntN(3) == 0 {
					reap.Evals = append(reap.Evals, e.ID)
				}
			}
			do(reap)
			for _, n := range nodes {
				again := *n
				again.Revision = r.Uint64N(20)
				if h.Snapshot().Node(nil, n.ID) == nil || r.IntN(2) == 0 {
					do(&RegisterNode{Node: &again})
				}
			}
		case 10:
			do(randomACL(h, r))
		case 11:
			do(randomIntro(h, r))
		case 12:
			v := &ModelVersion{Model: fmt.Sprintf("m%d", r.IntN(3)), Digest: fmt.Sprintf("sha256:%064x", r.IntN(30)), Origin: &ModelOrigin{JobID: key.ID}}
			if len(allocs) > 0 && r.IntN(2) == 0 {
				v.Origin = &ModelOrigin{AllocID: allocs[r.IntN(len(allocs))].ID}
			}
			do(&CreateModelVersion{Version: v})
		case 13, 14:
			do(randomChild(h, r))
		case 17:
			if d := snap.LatestDeployment(nil, key); d != nil {
				var ids []string
				for _, a := range snap.AllocsByDeployment(nil, d.ID) {
					ids = append(ids, a.ID)
				}
				do([]Command{
					&PromoteDeployment{DeploymentID: d.ID, EvalID: h.id()},
					&UpdateDeployment{Update: &DeploymentStatusUpdate{d.ID, []string{DeploymentFailed, DeploymentPaused, DeploymentRunning}[r.IntN(3)], "by hand"}, EvalID: h.id()},
					&UpdateDeployment{Update: &DeploymentStatusUpdate{DeploymentID: d.ID}, Healthy: ids, EvalID: h.id()},
				}[r.IntN(3)])
			}
			count := r.Int64N(3)
			do(&ScaleJob{Namespace: key.Namespace, JobID: key.ID, Group: "web", Count: []*int64{nil, &count}[r.IntN(2)], Message: "m", EvalID: h.id()})
			do(&TagVersion{Namespace: key.Namespace, JobID: key.ID, Name: fmt.Sprint(r.IntN(3)), Unset: r.IntN(3) == 0})
		}
	}
	return log
}

// TestGoldenBytes holds the stored form of every command: names are append-only.
// After adding a field run `go test ./cluster -update` and see that old files
// still decode (they are decoded here before they are compared).
func TestGoldenBytes(t *testing.T) {
	h := newHarness(t)
	node, job := testNode("00000001-0000-4000-8000-000000000001"), testJob("a", 2)
	e := &Evaluation{ID: "e", Namespace: "default", JobID: "a", Status: EvalStatusPending}
	for _, c := range []Command{
		&RegisterNode{Node: node}, &UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: "n", Status: "down", Message: "silent", Index: 7}}},
		&UpdateEligibility{NodeID: "n", Eligibility: NodeIneligible}, &UpdateDrain{NodeID: "n", Strategy: &DrainStrategy{Deadline: 1}},
		&DeregisterNode{NodeID: "n"}, &RegisterJob{Job: job, EvalID: "e"}, &DeregisterJob{Namespace: "default", JobID: "a", EvalID: "e"},
		&UpdateEvals{Evals: []*Evaluation{e}},
		&ApplyPlans{Plans: []*Plan{{EvalID: "e", Place: []*Allocation{testAlloc(h, e, job, node, "GPU-0")}, Stop: []*AllocStop{{AllocID: "x"}}}}},
		&UpdateAllocs{NodeID: "n", Allocs: []*Allocation{{ID: "x", ClientStatus: "running"}}},
		&UpdateTransitions{Transitions: map[string]DesiredTransition{"x": {}}}, &UpdateDeployment{Update: &DeploymentStatusUpdate{DeploymentID: "d"}},
		&SetJobStability{JobID: "a"}, &CreateModelVersion{Version: &ModelVersion{Model: "m", Origin: &ModelOrigin{AllocID: "x"}, Inputs: []TensorSpec{{"x", "FP32", []int64{-1, 4}}}}},
		&SetAlias{Model: "m", Alias: "production", Version: 1}, &SetSchedulerConfig{Config: &SchedulerConfiguration{}}, &Reap{Evals: []string{"e"}},
		&BootstrapACL{Token: &ACLToken{AccessorID: "a", SecretHash: "h", Type: ACLTokenManagement}, ResetIndex: 7},
		&UpsertACLPolicies{Policies: []*ACLPolicy{{Name: "p", Description: "d", Rules: "r"}}}, &DeleteACLPolicies{Names: []string{"p"}},
		&UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: "a", Name: "n", Policies: []string{"p"}, ExpirationTime: 5, ExpirationTTL: 4}}},
		&DeleteACLTokens{AccessorIDs: []string{"a"}, OnlyExpired: true},
		&CreateIntroToken{Token: &IntroToken{ID: "i", SecretHash: "h", Role: RoleNode, NodeName: "a", Uses: 1, ExpiresTime: 5}},
		&UseIntroToken{SecretHash: "h", Role: RoleNode, Name: "n", NodeName: "a", KeyHash: "k"},
		&DeleteIntroTokens{IDs: []string{"i"}, Enrollments: []EnrollmentKey{{RoleNode, "n"}}},
		&SetFleetHold{Hold: &FleetHold{Nodes: 4, Of: 10, Reason: "silent"}},
		&RegisterServer{Server: &Server{ID: "s", Name: "n", RaftAddr: "127.0.0.1:7648"}}, &RemoveServer{ID: "s", Left: true},
		&SetAutopilotConfig{Config: DefaultAutopilotConfig(), CheckIndex: true, Index: 3}, &SetClusterMeta{ClusterID: "c"},
		&DispatchJob{Namespace: "default", JobID: "a", Payload: []byte("p"), Meta: map[string]string{"k": "v"}, IDPrefix: "x", Priority: 60, IdempotencyToken: "t", EvalID: "e"},
		&LaunchJob{Namespace: "default", JobID: "a", At: 1, EvalID: "e"},
		&UpsertNamespaces{Namespaces: []*Namespace{{
			Name: "n", Quota: "q", Capabilities: &NamespaceCapabilities{EnabledTaskDrivers: []string{"exec"}},
			NodePoolConfiguration: &NamespaceNodePools{Default: "d", Denied: []string{"x*"}}, Meta: map[string]string{MetaCohort: "c"},
		}}},
		&DeleteNamespaces{Names: []string{"n"}}, &DeleteQuotas{Names: []string{"q"}},
		&UpsertQuotas{Quotas: []*Quota{{Name: "q", Limits: []*QuotaLimit{{Region: "global", CPU: limit(-1), Devices: []*QuotaDevice{{"nvidia/gpu", 2}}}}}}},
		&PromoteDeployment{DeploymentID: "d", Groups: []string{"g"}, EvalID: "e"},
		&ScaleJob{Namespace: "default", JobID: "a", Group: "g", Count: new(int64), Message: "m", Meta: []byte(`{"a":1}`), EvalID: "e"},
		&TagVersion{Namespace: "default", JobID: "a", Name: "t", Description: "why", Version: new(uint64), Unset: true},
		&OrderDevice{NodeID: "n", DeviceID: "GPU-0", Order: &DeviceOrder{Order: DeviceCordon, Move: true, Reason: "fan"}},
	} {
		*c.stamp() = Stamp{RequestID: "r", Time: 1}
		name := strings.TrimPrefix(fmt.Sprintf("%T", c), "*cluster.")
		got := EncodeCommand(c)
		if Kind(got[0]) != c.kind() {
			goldenBytes(t, name+"Short", c, got)
			got = encodeCommand(c, rulesScaling-1)
		}
		goldenBytes(t, name, c, got)
	}
}

// goldenBytes compares an entry with what was written once.
func goldenBytes(t *testing.T, name string, c Command, got []byte) {
	path := filepath.Join("testdata", "golden", name+".hex")
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(hex.EncodeToString(got)+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if old, err := DecodeCommand(want); err != nil || !bytes.Equal(encodeCommand(old, c.stamp().Rules), got) {
		t.Errorf("%s: bytes written before no longer mean the same (%v)", name, err)
	}
	if !bytes.Equal(want, got) {
		t.Errorf("%s: stored form changed\n got %x\nwant %x", name, got, want)
	}
}

// TestRulesOfAll: commands go by the newest rules that all servers know, and entries by newer ones are refused.
func TestRulesOfAll(t *testing.T) {
	h := newHarness(t)
	rules := func() uint64 {
		c, err := DecodeCommand(h.Snapshot().EncodeCommand(&SetFleetHold{}))
		if err != nil {
			t.Fatal(err)
		}
		return c.stamp().Rules
	}
	server := func(id string, knows uint64) *RegisterServer {
		return &RegisterServer{Server: &Server{ID: id, RaftAddr: id + ":1", Rules: knows}}
	}
	for _, step := range []struct {
		cmd  Command
		want uint64
	}{
		{nil, 0},
		{server("new", CurrentRules), CurrentRules},
		{server("old", 0), 0},
		{server("newer", CurrentRules+1), 0},
		{server("old", CurrentRules), CurrentRules},
		{server("gone", 0), 0},
		{&RemoveServer{ID: "gone", Left: true}, CurrentRules},
	} {
		if step.cmd != nil {
			h.must(step.cmd)
		}
		if got := rules(); got != step.want {
			t.Errorf("after %T: rules %d, not %d", step.cmd, got, step.want)
		}
	}
	if _, err := DecodeCommand(encodeCommand(&SetFleetHold{}, CurrentRules+1)); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Errorf("an entry by newer rules: %v", err)
	}
}
