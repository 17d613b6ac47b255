package sim

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of what users ask for.
const (
	jobNames   = 16
	modelNames = 3
	userTries  = 5

	// drainPatience is when an operator takes back a drain without a deadline: it may
	// wait for ever for a group that finds no room for what it lacks.
	drainPatience = 10 * time.Minute
)

// user is somebody, or some program, who uses the servers: any of them, which may
// be behind.
type user struct {
	w *world
	n int
}

func newUser(w *world, n int) *user { return &user{w: w, n: n} }

// action is something that users do; nil when it makes no sense now.
type action struct {
	weight int
	do     func(u *user, snap *cluster.Snapshot) cluster.Command
}

// actions together bring up every kind of command that is not the leader's or
// the agents' own.
var actions = []action{
	{30, (*user).register},
	{25, (*user).scale},
	{8, (*user).stop},
	{4, (*user).evaluate},
	{6, (*user).stopAlloc},
	{3, (*user).eligibility},
	{3, (*user).orderDevice},
	{4, (*user).drain},
	{2, (*user).forgetNode},
	{3, (*user).deployment},
	{3, (*user).promote},
	{1, (*user).judge},
	{2, (*user).tag},
	{1, (*user).stability},
	{4, (*user).pushModel},
	{4, (*user).alias},
	{1, (*user).schedulerConfig},
	{1, (*user).autopilotConfig},
	{1, (*user).registerServer},
	{1, (*user).removeServer},
	{1, (*user).clusterMeta},
	{1, (*user).bootstrapACL},
	{1, (*user).upsertPolicies},
	{1, (*user).deletePolicies},
	{1, (*user).upsertTokens},
	{1, (*user).deleteTokens},
	{4, (*user).form},
	{6, (*user).dispatch},
	{2, (*user).launch},
	{2, (*user).limit},
	{2, (*user).introduce},
	{2, (*user).enrol},
	{1, (*user).deleteIntroductions},
}

// act does one thing, waits for the answer and some time, and goes on.
func (u *user) act() {
	w := u.w
	if w.calm {
		return
	}
	next := func() { w.after(w.upTo(2*w.weather.actEvery), u.act) }
	s := w.anyServer()
	if !s.up || s.paused {
		next()
		return
	}
	total := 0
	for _, a := range actions {
		total += a.weight
	}
	n := w.rnd.IntN(total)
	for _, a := range actions {
		if n -= a.weight; n >= 0 {
			continue
		}
		cmd := a.do(u, s.state.Snapshot())
		if cmd == nil {
			next()
			return
		}
		w.propose(outside, cmd, userTries, w.anyServer, func(cluster.Result, error) { next() })
		return
	}
}

// tidy takes back what would keep work from draining. It goes on until the state
// shows that nothing of it is left.
func (u *user) tidy() {
	w := u.w
	next := func() { w.after(time.Second, u.tidy) }
	s := w.ahead()
	if s == nil {
		next()
		return
	}
	snap := s.state.Snapshot()
	var cmds []cluster.Command
	if c := snap.SchedulerConfig(nil); c.PauseEvalBroker || c.RejectJobRegistration {
		cmds = append(cmds, &cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{SchedulerAlgorithm: "binpack"}})
	}
	if snap.Namespace(nil, cluster.DefaultNamespace).Quota != "" {
		cmds = append(cmds, &cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: cluster.DefaultNamespace}}})
	}
	for _, d := range snap.ActiveDeployments(nil) {
		if d.Status == cluster.DeploymentPaused {
			cmds = append(cmds, &cluster.UpdateDeployment{
				Update: &cluster.DeploymentStatusUpdate{DeploymentID: d.ID, Status: cluster.DeploymentRunning, StatusDescription: cluster.DeploymentDescRunning},
				EvalID: w.newID(),
			})
		} else if ready(snap, d) {
			cmds = append(cmds, &cluster.PromoteDeployment{DeploymentID: d.ID, EvalID: w.newID()})
		}
	}
	for _, j := range snap.LaunchingJobs(nil) {
		cmds = append(cmds, &cluster.DeregisterJob{Namespace: j.Namespace, JobID: j.ID, EvalID: w.newID()})
	}
	for _, n := range snap.Nodes(nil, "") {
		if d := n.DrainStrategy; n.Drain && d != nil && d.Deadline == 0 && s.clock() > d.StartedAt.Add(drainPatience) {
			cmds = append(cmds, &cluster.UpdateDrain{NodeID: n.ID, MarkEligible: true})
		}
		if !n.Drain && n.SchedulingEligibility != cluster.NodeEligible {
			cmds = append(cmds, &cluster.UpdateEligibility{NodeID: n.ID, Eligibility: cluster.NodeEligible})
		}
	}
	left := len(cmds)
	if left == 0 {
		w.after(5*time.Second, u.tidy)
		return
	}
	for _, c := range cmds {
		w.propose(outside, c, 50, w.anyServer, func(cluster.Result, error) {
			if left--; left == 0 {
				next()
			}
		})
	}
}

func (u *user) jobID() string { return fmt.Sprintf("job-%d", u.w.rnd.IntN(jobNames)) }

func someJob(u *user, snap *cluster.Snapshot) *cluster.Job {
	if jobs := snap.Jobs(nil, "*", ""); len(jobs) > 0 {
		return pick(u.w, jobs)
	}
	return nil
}

func someNode(u *user, snap *cluster.Snapshot) *cluster.Node {
	if nodes := snap.Nodes(nil, ""); len(nodes) > 0 {
		return pick(u.w, nodes)
	}
	return nil
}

// register submits a job, half of the time by compare-and-set.
func (u *user) register(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	j := u.job(u.jobID(), snap)
	cmd := &cluster.RegisterJob{
		Job: j, EvalID: w.newID(), EnforceIndex: w.chance(500), PreserveCounts: w.chance(100),
		Submission: &cluster.JobSubmission{Source: "job " + j.ID, Format: "hcl2"},
	}
	if old := snap.Job(nil, j.Key()); old != nil {
		cmd.JobModifyIndex = old.JobModifyIndex
	}
	return cmd
}

// scale changes a job's count, by compare-and-set as `nomad job scale` does.
func (u *user) scale(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	old := someJob(u, snap)
	if old == nil || old.Stop {
		return nil
	}
	if w.chance(300) {
		n := int64(w.rnd.IntN(6))
		return &cluster.ScaleJob{
			Namespace: old.Namespace, JobID: old.ID, Group: pick(w, old.TaskGroups).Name, Count: &n, EvalID: w.newID(), JobModifyIndex: old.JobModifyIndex,
		}
	}
	j := cluster.Clone(old)
	pick(w, j.TaskGroups).Count = w.rnd.IntN(6)
	return &cluster.RegisterJob{Job: j, EvalID: w.newID(), EnforceIndex: true, JobModifyIndex: old.JobModifyIndex}
}

func (u *user) stop(*cluster.Snapshot) cluster.Command {
	w := u.w
	return &cluster.DeregisterJob{
		Namespace: cluster.DefaultNamespace, JobID: u.jobID(), Purge: w.chance(300), NoShutdownDelay: w.chance(200), EvalID: w.newID(),
	}
}

func (u *user) newEval(j *cluster.Job, trigger string) *cluster.Evaluation {
	return &cluster.Evaluation{
		ID: u.w.newID(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: trigger, JobModifyIndex: j.JobModifyIndex, Status: cluster.EvalStatusPending,
	}
}

func (u *user) evaluate(snap *cluster.Snapshot) cluster.Command {
	j := someJob(u, snap)
	if j == nil {
		return nil
	}
	return &cluster.UpdateEvals{Evals: []*cluster.Evaluation{u.newEval(j, cluster.TriggerJobRegister)}}
}

// stopAlloc is `nomad alloc stop`, or a forced reschedule.
func (u *user) stopAlloc(snap *cluster.Snapshot) cluster.Command {
	allocs := snap.Allocs(nil, "")
	if len(allocs) == 0 {
		return nil
	}
	a, yes := pick(u.w, allocs), true
	j := snap.Job(nil, a.JobKey())
	if j == nil {
		return nil
	}
	t := cluster.DesiredTransition{Migrate: &yes}
	if u.w.chance(300) {
		t = cluster.DesiredTransition{ForceReschedule: &yes}
	}
	return &cluster.UpdateTransitions{
		Transitions: map[string]cluster.DesiredTransition{a.ID: t},
		Evals:       []*cluster.Evaluation{u.newEval(j, cluster.TriggerAllocStop)},
	}
}

func (u *user) eligibility(snap *cluster.Snapshot) cluster.Command {
	n := someNode(u, snap)
	if n == nil {
		return nil
	}
	cmd := &cluster.UpdateEligibility{NodeID: n.ID, Eligibility: cluster.NodeEligible}
	if u.w.chance(300) {
		cmd.Eligibility = cluster.NodeIneligible
	}
	return cmd
}

func (u *user) drain(snap *cluster.Snapshot) cluster.Command {
	w, n := u.w, someNode(u, snap)
	if n == nil {
		return nil
	}
	cmd := &cluster.UpdateDrain{NodeID: n.ID, MarkEligible: w.chance(800)}
	if w.chance(500) {
		cmd.Strategy = &cluster.DrainStrategy{Deadline: []time.Duration{0, -1, 5 * time.Second, time.Minute}[w.rnd.IntN(4)]}
	}
	return cmd
}

// forgetNode purges a node, most often one that is down.
func (u *user) forgetNode(snap *cluster.Snapshot) cluster.Command {
	n := someNode(u, snap)
	if n == nil || n.Status != cluster.NodeStatusDown && !u.w.chance(100) {
		return nil
	}
	return &cluster.DeregisterNode{NodeID: n.ID}
}

func (u *user) deployment(snap *cluster.Snapshot) cluster.Command {
	w, ds := u.w, snap.Deployments(nil, "")
	if len(ds) == 0 {
		return nil
	}
	d := pick(w, ds)
	update := &cluster.DeploymentStatusUpdate{DeploymentID: d.ID, Status: cluster.DeploymentFailed, StatusDescription: cluster.DeploymentDescFailedByUser}
	switch w.rnd.IntN(3) {
	case 0:
		update.Status, update.StatusDescription = cluster.DeploymentPaused, "Deployment is paused"
	case 1:
		update.Status, update.StatusDescription = cluster.DeploymentRunning, cluster.DeploymentDescRunning
	}
	return &cluster.UpdateDeployment{Update: update, EvalID: w.newID()}
}

func (u *user) stability(snap *cluster.Snapshot) cluster.Command {
	j := someJob(u, snap)
	if j == nil {
		return nil
	}
	return &cluster.SetJobStability{Namespace: j.Namespace, JobID: j.ID, Version: j.Version, Stable: u.w.chance(500)}
}

func (u *user) modelName() string { return fmt.Sprintf("model-%d", u.w.rnd.IntN(modelNames)) }

// pushModel registers a model, half of the time as made by an allocation.
func (u *user) pushModel(snap *cluster.Snapshot) cluster.Command {
	var origin *cluster.ModelOrigin
	if j := someJob(u, snap); j != nil && u.w.chance(500) {
		if allocs := snap.AllocsByJob(nil, j.Key()); len(allocs) > 0 {
			origin = &cluster.ModelOrigin{AllocID: pick(u.w, allocs).ID}
		}
	}
	return &cluster.CreateModelVersion{Version: &cluster.ModelVersion{
		Origin: origin,
		Model:  u.modelName(), Digest: fmt.Sprintf("sha256:%064x", u.w.rnd.IntN(40)), Size: 1 << 20, Platform: "onnxruntime_onnx",
		Inputs: []cluster.TensorSpec{{Name: "x", Datatype: "FP32", Shape: []int64{-1, 784}}},
	}}
}

// alias moves an alias, or takes it away.
func (u *user) alias(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	cmd := &cluster.SetAlias{Model: u.modelName(), Alias: "production"}
	if m := snap.Model(nil, cmd.Model); m != nil && !w.chance(100) {
		cmd.Version = 1 + uint64(w.rnd.IntN(int(m.LatestVersion)))
	}
	return cmd
}

func (u *user) schedulerConfig(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	return &cluster.SetSchedulerConfig{
		Config: &cluster.SchedulerConfiguration{
			SchedulerAlgorithm: []string{"binpack", "spread"}[w.rnd.IntN(2)],
			PauseEvalBroker:    w.chance(100), RejectJobRegistration: w.chance(100),
			PreemptionConfig: cluster.PreemptionConfig{ServiceSchedulerEnabled: w.chance(500), BatchSchedulerEnabled: w.chance(700)},
		},
		CheckIndex: w.chance(500), Index: snap.SchedulerConfig(nil).ModifyIndex,
	}
}

// job draws a specification: small against the nodes, but together too much.
func (u *user) job(id string, snap *cluster.Snapshot) *cluster.Job {
	w := u.w
	j := &cluster.Job{
		Region: "global", Namespace: cluster.DefaultNamespace, ID: id, Name: id, Type: cluster.JobTypeService,
		Priority: w.oneOf(20, 50, 50, 80), Datacenters: []string{"*"}, NodePool: cluster.DefaultNodePool, AllAtOnce: w.chance(150),
	}
	switch {
	case w.chance(400):
		j.Type = cluster.JobTypeBatch
	case w.chance(150):
		j.Type = cluster.JobTypeSystem
	case w.chance(100):
		j.Type = cluster.JobTypeSysBatch
	}
	if w.chance(150) {
		j.Datacenters = []string{"dc1"}
	}
	if w.chance(100) {
		j.Constraints = append(j.Constraints, &cluster.Constraint{LTarget: "${attr.rack}", RTarget: fmt.Sprint(w.rnd.IntN(4)), Operand: "!="})
	}
	if w.chance(100) {
		j.Constraints = append(j.Constraints, &cluster.Constraint{Operand: "distinct_hosts", RTarget: "true"})
	}
	for i := range 1 + w.rnd.IntN(2) {
		j.TaskGroups = append(j.TaskGroups, u.group(j, fmt.Sprintf("group%d", i), snap))
	}
	return j
}

func (u *user) group(j *cluster.Job, name string, snap *cluster.Snapshot) *cluster.TaskGroup {
	w := u.w
	t := &cluster.Task{
		Name: "task", Driver: "raw_exec", Config: json.RawMessage(fmt.Sprintf(`{"command":"/bin/v%d"}`, w.rnd.IntN(3))),
		Resources: &cluster.Resources{CPU: w.oneOf(50, 100, 300, 700), MemoryMB: w.oneOf(64, 256, 1024)},
	}
	g := &cluster.TaskGroup{Name: name, Count: w.rnd.IntN(5), Tasks: []*cluster.Task{t}, EphemeralDisk: &cluster.EphemeralDisk{SizeMB: 100}}
	if w.chance(400) {
		d := &cluster.RequestedDevice{Name: "nvidia/gpu", Count: uint64(w.oneOf(1, 1, 1, 2, 4))}
		t.Resources.Devices = append(t.Resources.Devices, d)
	}
	if w.chance(300) {
		g.Networks = []*cluster.NetworkResource{{Mode: "host", DynamicPorts: []cluster.Port{{Label: "http", To: -1}}}}
		if w.chance(300) {
			g.Networks[0].ReservedPorts = []cluster.Port{{Label: "fixed", Value: 8000 + w.rnd.IntN(3)}}
		}
	}
	if m := snap.Model(nil, u.modelName()); m != nil && w.chance(300) {
		t.Driver, t.Model = "onnx", &cluster.ModelRef{Reference: m.Name, Name: m.Name}
		if m.Aliases["production"] != 0 {
			t.Model.Reference, t.Model.Alias = m.Name+"@production", "production"
		}
	}
	if w.chance(700) {
		g.ReschedulePolicy = &cluster.ReschedulePolicy{Unlimited: true, Delay: w.upTo(3 * time.Second), MaxDelay: 10 * time.Second, DelayFunction: "exponential"}
	} else {
		g.ReschedulePolicy = &cluster.ReschedulePolicy{Attempts: w.rnd.IntN(3), Interval: time.Minute, Delay: time.Second, DelayFunction: "constant"}
	}
	if j.PerNode() {
		g.Count, g.ReschedulePolicy = 1, nil
		if w.chance(500) {
			g.Update = &cluster.UpdateStrategy{MaxParallel: 1 + w.rnd.IntN(3), Stagger: w.between(time.Second, 5*time.Second)}
		}
		if w.chance(250) {
			g.Disconnect = u.disconnect()
		}
	}
	if j.Type == cluster.JobTypeService {
		if w.chance(800) {
			g.Update = &cluster.UpdateStrategy{MaxParallel: 1 + w.rnd.IntN(3), ProgressDeadline: w.between(5*time.Second, 40*time.Second)}
			u.tryOut(g)
		}
		g.Migrate = &cluster.MigrateStrategy{MaxParallel: 1 + w.rnd.IntN(2)}
		if w.chance(250) {
			g.Disconnect = u.disconnect()
		}
	}
	if !j.AllAtOnce && g.Disconnect == nil && w.chance(250) {
		g.Gang = &cluster.Gang{Required: w.chance(300)}
		if w.chance(500) {
			g.Gang.Topology = []string{"${node.unique.id}", "${attr.rack}"}
		}
	}
	if w.chance(200) {
		g.Preempt = &cluster.PreemptPolicy{Never: w.chance(200), MinRuntime: w.upTo(10 * time.Second)}
		g.Preempt.Move = !g.Preempt.Never && w.chance(500)
	}
	return g
}

func (u *user) disconnect() *cluster.DisconnectStrategy {
	w := u.w
	ways := []string{
		cluster.ReconcileBestScore, cluster.ReconcileLongestRunning, cluster.ReconcileKeepOriginal, cluster.ReconcileKeepReplacement,
	}
	return &cluster.DisconnectStrategy{LostAfter: w.between(2*time.Second, 30*time.Second), Replace: w.chance(600), Reconcile: pick(w, ways)}
}
