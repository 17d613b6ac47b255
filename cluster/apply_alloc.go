package cluster

import (
	"cmp"
	"slices"
)

// applyPlan commits what of a plan still fits. Nodes are checked one by one;
// a node on which the plan no longer fits is refused with all that the plan
// does there, and the evaluation stays open for the rest.
func (t *tx) applyPlan(p *Plan) PlanResult {
	res := PlanResult{EvalID: p.EvalID}
	eval := t.Eval(nil, p.EvalID)
	if eval == nil || eval.Terminal() || (p.EvalEpoch != 0 && p.EvalEpoch != eval.ModifyIndex) {
		res.Stale = true
		return res
	}
	job := t.JobVersion(nil, JobKey{p.Namespace, p.JobID}, p.JobVersion)
	if job == nil && len(p.Place) > 0 || !t.knowVersions(p) {
		res.Stale = true
		return res
	}
	if t.heardAgain(p) || t.overtaken(p) {
		res.Stale = true
		return res
	}
	place := map[string][]*Allocation{}
	for _, a := range p.Place {
		place[a.NodeID] = append(place[a.NodeID], a)
	}
	refused := map[string]bool{}
	var allowance *Allowance
	waits := false // for other children of its parent
	if t.stamp.Rules >= rulesEngine && len(place) > 0 {
		allowance, waits = t.Allowance(p.Namespace, t.usageOf), !t.mayBegin(job)
	}
	for _, nodeID := range sortedKeys(place) {
		reason := t.fit(nodeID, place[nodeID])
		if fitChecked && reason != "" || waits || allowance != nil && !t.grant(allowance, job, place[nodeID]) {
			refused[nodeID] = true
			res.Refused = append(res.Refused, nodeID)
		}
	}
	res.Refused = append(res.Refused, refuseGangs(p, refused)...)
	if (p.AllAtOnce || p.preempts()) && len(refused) > 0 {
		return res
	}
	if p.Deployment != nil {
		t.putDeployment(p.Deployment, nil)
	}
	for _, u := range p.DeploymentUpdates {
		t.setDeploymentStatus(u)
	}
	for _, s := range p.Stop {
		if a := t.Alloc(nil, s.AllocID); a != nil && !refused[a.NodeID] {
			t.stopAlloc(a, s)
		}
	}
	for _, a := range p.Place {
		if !refused[a.NodeID] {
			t.placeAlloc(a, t.versionOf(a, job))
		}
	}
	if len(refused) == 0 {
		t.putEvals(p.Evals)
	}
	t.evalPreempted(p)
	t.giveUpNodes(p)
	return res
}

// knowVersions says whether the older versions are kept of which a plan places allocations.
func (t *tx) knowVersions(p *Plan) bool {
	return t.stamp.Rules < rulesEngine || !slices.ContainsFunc(p.Place, func(a *Allocation) bool {
		return a.JobVersion != p.JobVersion && t.JobVersion(nil, a.JobKey(), a.JobVersion) == nil
	})
}

// versionOf is the version of the job that a placed allocation runs: the plan's, or, where canaries wait for their
// promotion, that of what it takes the place of.
func (t *tx) versionOf(a *Allocation, job *Job) *Job {
	if t.stamp.Rules >= rulesEngine && a.JobVersion != job.Version {
		return t.JobVersion(nil, a.JobKey(), a.JobVersion)
	}
	return job
}

// heardAgain says whether a plan gives up allocations whose node has come back
// since it was made: what runs there goes on, and must not run elsewhere too.
func (t *tx) heardAgain(p *Plan) bool {
	for _, s := range p.Stop {
		if s.ClientStatus == "" {
			continue
		}
		if a := t.Alloc(nil, s.AllocID); a != nil && !a.ClientTerminal() {
			if n := t.Node(nil, a.NodeID); n != nil && !n.Silent() {
				return true
			}
		}
	}
	return false
}

// giveUpNodes marks the disconnected nodes down of which nothing is awaited any
// more once the plan's lost allocations are.
func (t *tx) giveUpNodes(p *Plan) {
	if t.FleetHold(nil) != nil {
		return
	}
	for _, s := range p.Stop {
		if s.ClientStatus != AllocClientLost {
			continue
		}
		a := t.Alloc(nil, s.AllocID)
		if a == nil {
			continue
		}
		if n := t.Node(nil, a.NodeID); n != nil && n.Status == NodeStatusDisconnected && !t.awaited(n) {
			t.setNodeStatus(n, NodeStatusDown, "Nothing on the node is awaited any more")
		}
	}
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// fit says why allocations cannot go to a node, "" when they can.
func (t *tx) fit(nodeID string, place []*Allocation) string {
	n := t.Node(nil, nodeID)
	if n == nil {
		return "node is gone"
	}
	for _, a := range place {
		if t.Alloc(nil, a.ID) == nil && !n.Ready() {
			return "node is not ready"
		}
	}
	use := t.use(n)
	var left []*Allocation // that are updated in place
	for _, a := range place {
		if old := t.Alloc(nil, a.ID); old != nil && old.Occupies() {
			left = append(left, old)
			use.Remove(old)
		}
	}
	for _, a := range place {
		use.Add(a)
	}
	fault := use.Fault()
	for _, a := range place { // the state is as it was
		use.Remove(a)
	}
	for _, a := range left {
		use.Add(a)
	}
	if len(use.faults) > 0 {
		delete(t.batch.state.uses, nodeID) // see recount
	}
	return fault
}

// maxUses bounds the nodes whose use a state remembers.
const maxUses = 20_000

// use gives what is held of a node now. Whoever adds to it takes it back.
func (t *tx) use(n *Node) *NodeUse {
	uses := t.batch.state.uses
	u := uses[n.ID]
	if u == nil {
		if len(uses) >= maxUses {
			clear(uses)
		}
		u = NewNodeUse(n)
		each(t.txn, func(a *Allocation) bool { u.Add(a); return true }, TableAllocs, "holds", n.ID)
		uses[n.ID] = u
	}
	u.node = n
	return u
}

// recount keeps what is remembered of nodes' use in step with a change of a record.
func (b *batch) recount(of *Table, old, now any) {
	if of.Name != TableAllocs {
		return
	}
	was, is := holdingOf(old), holdingOf(now)
	if was == is {
		return
	}
	count := func(h heldOn, change func(*NodeUse, holding)) {
		u := b.state.uses[h.node]
		if u == nil {
			return
		}
		if change(u, h.holding); len(u.faults) > 0 {
			delete(b.state.uses, h.node) // what is held twice cannot be taken back once
		}
	}
	count(was, (*NodeUse).remove)
	count(is, (*NodeUse).add)
}

// heldOn is what an allocation holds, and of which node.
type heldOn struct {
	node string
	holding
}

// holdingOf is what an allocation's record holds; zero for none and nothing.
func holdingOf(record any) heldOn {
	a, _ := record.(*Allocation)
	if a == nil || !a.Occupies() {
		return heldOn{}
	}
	return heldOn{a.NodeID, holding{a.ID, a.AllocatedResources}}
}

func (t *tx) stopAlloc(old *Allocation, s *AllocStop) {
	if old.ServerTerminal() && s.ClientStatus == "" {
		return
	}
	a := *old
	if s.DesiredStatus != "" {
		a.DesiredStatus, a.DesiredDescription = s.DesiredStatus, s.DesiredDescription
	}
	if s.FollowupEvalID != "" {
		a.FollowupEvalID = s.FollowupEvalID
	}
	if s.PreemptedBy != "" {
		a.PreemptedByAllocation = s.PreemptedBy
	}
	switch {
	case old.ClientTerminal():
	case s.ClientStatus == AllocClientUnknown: // gateways may reach it all the same
		if old.ClientStatus != AllocClientUnknown {
			a.UnknownSince = Time(t.stamp.Time)
		}
		a.ClientStatus, a.ClientDescription = AllocClientUnknown, AllocUnknownDescription
	case s.ClientStatus != "":
		a.ClientStatus, a.Serving, a.UnknownSince = s.ClientStatus, nil, 0
	}
	t.putAlloc(&a, old, true)
	if kept := t.Alloc(nil, s.Keeps); kept != nil && kept.NextAllocation != "" {
		k := *kept
		k.NextAllocation = ""
		t.putAlloc(&k, kept, false)
	}
}

// placeAlloc stores a new allocation, or an update in place of one that runs:
// then what the node said of it stays.
func (t *tx) placeAlloc(a *Allocation, job *Job) {
	old := t.Alloc(nil, a.ID)
	a.JobVersion, a.JobCreateIndex = job.Version, job.CreateIndex
	if t.stamp.Rules < rulesEngine {
		a.AllocatedResources = withoutMemory(a.AllocatedResources)
	}
	if old == nil {
		a.CreateIndex, a.Epoch, a.CreateTime, a.Revision = t.index, t.index, t.stamp.Time, 0
		a.ClientStatus, a.Serving = AllocClientPending, toServe(job, a.TaskGroup)
		a.TaskStates, a.packedStates = nil, ""
		if prev := t.Alloc(nil, a.PreviousAllocation); a.PreviousAllocation != "" && prev != nil {
			p := *prev
			p.NextAllocation = a.ID
			t.putAlloc(&p, prev, false)
		}
	} else {
		a.CreateIndex, a.Epoch, a.CreateTime, a.Revision = old.CreateIndex, old.Epoch, old.CreateTime, old.Revision
		a.ClientStatus, a.ClientDescription = old.ClientStatus, old.ClientDescription
		a.TaskStates, a.packedStates = old.TaskStates, old.packedStates
		a.Serving, a.UnknownSince, a.Checkpoints = old.Serving, old.UnknownSince, old.Checkpoints
		a.DesiredTransition = old.DesiredTransition // asked for since the plan was made
		if old.PreemptedByAllocation != "" {
			a.DesiredStatus, a.DesiredDescription, a.PreemptedByAllocation = old.DesiredStatus, old.DesiredDescription, old.PreemptedByAllocation
		}
	}
	t.putAlloc(a, old, true)
	if old == nil || old.DeploymentID != a.DeploymentID {
		t.countPlaced(a)
	}
}

// putAlloc stores an allocation; desired says whether its desired side changed.
func (t *tx) putAlloc(a, old *Allocation, desired bool) {
	a.ModifyIndex, a.ModifyTime = t.index, t.stamp.Time
	if desired {
		a.AllocModifyIndex = t.index
	}
	t.put(TableAllocs, a)
	if old != nil && old.Occupies() && !a.Occupies() {
		t.touch(IndexCapacity)
	}
	from := ""
	if old != nil {
		from = old.ClientStatus
	}
	t.count(a, from, a.ClientStatus)
	t.dirty[a.JobKey()] = true
	if old != nil && old.DeploymentID == a.DeploymentID && old.upWell() && !a.upWell() {
		t.uncountHealthy(a)
	}
}

// updateAllocs merges what a node says, unless it has said something newer. Health moves the deployment; a failure,
// and a word of an allocation that was unknown, ask for an evaluation of the job.
func (t *tx) updateAllocs(c *UpdateAllocs) {
	var failed, progressed, reconnected []JobKey
	advanced := map[string]bool{} // deployments that go on
	for _, u := range c.Allocs {
		old := t.Alloc(nil, u.ID)
		if old == nil || (c.NodeID != "" && old.NodeID != c.NodeID) || (u.NodeID != "" && old.NodeID != u.NodeID) ||
			(u.Epoch != 0 && u.Epoch < old.Epoch) || (u.Revision != 0 && u.Revision <= old.Revision) || old.ClientTerminal() || u.ClientStatus == AllocClientUnknown {
			continue
		}
		a := *old
		a.ClientStatus, a.ClientDescription, a.UnknownSince = u.ClientStatus, u.ClientDescription, 0
		if u.Revision != 0 {
			a.Revision = u.Revision
		}
		a.TaskStates, a.packedStates = trimTaskStates(u.TaskStates), u.packedStates
		a.Serving = mergeServing(old.Serving, u.Serving)
		if len(u.Checkpoints) > 0 && len(u.Checkpoints) <= MaxCheckpoints && t.stamp.Rules >= rulesEngine {
			a.Checkpoints = u.Checkpoints
		}
		if a.ClientTerminal() {
			a.Serving = nil
		}
		if old.ClientStatus == AllocClientUnknown {
			t.heard(&a)
		}
		health := mergeHealth(&a, u.DeploymentStatus, t.index, Time(t.stamp.Time))
		t.putAlloc(&a, old, false)
		switch {
		case health == nil || !t.countHealth(&a, *health):
		case *health && t.stamp.Rules >= rulesSparse:
			advanced[a.DeploymentID] = true
		default:
			progressed = append(progressed, a.JobKey())
		}
		if old.ClientStatus == AllocClientUnknown && !a.ServerTerminal() {
			reconnected = append(reconnected, a.JobKey())
		} else if !a.ServerTerminal() && t.missed(&a) {
			failed = append(failed, a.JobKey())
		}
	}
	t.evalJobs(reconnected, TriggerReconnect, nil)
	t.evalJobs(failed, TriggerAllocFailure, nil)
	for _, id := range sortedKeys(advanced) {
		if d := t.Deployment(nil, id); t.unfinished(d) {
			progressed = append(progressed, d.JobKey())
		}
	}
	t.evalJobs(progressed, TriggerDeploymentWatcher, nil)
}

// missed says whether an allocation that was to run has ended before its time. A
// service that ends well has too: after a restore a node tells of stops that the
// state no longer knows of.
func (t *tx) missed(a *Allocation) bool {
	if a.ClientStatus != AllocClientComplete {
		return a.ClientStatus == AllocClientFailed
	}
	j := t.JobVersion(nil, a.JobKey(), a.JobVersion)
	return j != nil && !j.Finite()
}

// heard ends the wait for an allocation that was unknown. Others that the same
// evaluation was to give up get a new one when the job is reconciled.
func (t *tx) heard(a *Allocation) {
	if e := t.Eval(nil, a.FollowupEvalID); e != nil && !e.Terminal() {
		c := *e
		c.Status, c.StatusDescription = EvalStatusCanceled, "cancelled: the node has come back"
		t.putEvals([]*Evaluation{&c})
	}
	a.FollowupEvalID = ""
}

// toServe is what an allocation of the group will serve, not ready yet; nil when
// it serves no model. Gateways let requests wait for it.
func toServe(job *Job, group string) *Serving {
	g := job.Group(group)
	if g == nil {
		return nil
	}
	for _, t := range g.Tasks {
		if t.Model != nil {
			return &Serving{Task: t.Name, Model: t.Model.Name, Version: t.Model.Version}
		}
	}
	return nil
}

// mergeServing takes over what a node says. While it says nothing the
// allocation still is to serve, and is not ready.
func mergeServing(old, said *Serving) *Serving {
	if said != nil || old == nil {
		return said
	}
	s := *old
	s.Address, s.Ready = "", false
	return &s
}

// trimTaskStates bounds the events of each task.
func trimTaskStates(states map[string]*TaskState) map[string]*TaskState {
	for name, s := range states {
		if s != nil && len(s.Events) > MaxTaskEvents {
			n := *s
			n.Events = s.Events[len(s.Events)-MaxTaskEvents:]
			states[name] = &n
		}
	}
	return states
}

// mergeHealth takes over a change of health and gives it, nil for no change.
func mergeHealth(a *Allocation, said *AllocDeploymentStatus, index uint64, now Time) *bool {
	if said == nil || said.Healthy == nil {
		return nil
	}
	status := AllocDeploymentStatus{}
	if a.DeploymentStatus != nil {
		status = *a.DeploymentStatus
		if status.Healthy != nil && *status.Healthy == *said.Healthy {
			return nil
		}
	}
	healthy := *said.Healthy
	status.Healthy, status.Timestamp, status.ModifyIndex = &healthy, said.Timestamp, index
	if status.Timestamp == 0 {
		status.Timestamp = now
	}
	a.DeploymentStatus = &status
	return &healthy
}

func (t *tx) updateTransitions(c *UpdateTransitions) {
	for _, id := range sortedKeys(c.Transitions) {
		old := t.Alloc(nil, id)
		if old == nil {
			continue
		}
		a, tr := *old, c.Transitions[id]
		for _, f := range []struct{ to, from **bool }{
			{&a.DesiredTransition.Migrate, &tr.Migrate},
			{&a.DesiredTransition.Reschedule, &tr.Reschedule},
			{&a.DesiredTransition.ForceReschedule, &tr.ForceReschedule},
			{&a.DesiredTransition.NoShutdownDelay, &tr.NoShutdownDelay},
		} {
			if *f.from != nil {
				*f.to = *f.from
			}
		}
		t.putAlloc(&a, old, true)
	}
	t.putEvals(c.Evals)
}
