package sim

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// becalm ends faults and load: everything comes back, and an operator takes back
// what users left paused.
func (w *world) becalm() {
	w.note("calm")
	w.calm = true
	w.faults.stop()
	w.weather = fair(w.weather)
	clear(w.net.cut)
	for _, s := range w.servers {
		s.paused, s.full, s.slow, s.lag, s.skew = false, false, 0, 0, 0
		if !s.up {
			s.boot()
		}
	}
	for _, n := range w.nodes {
		n.skew = 0
		if n.up {
			n.startAgent()
		} else {
			n.comeBack(false)
		}
	}
	w.users[0].tidy()
}

// ahead is the server that leads and has applied all it has; nil while there is none.
func (w *world) ahead() *server {
	for _, s := range w.servers {
		if s.role == leader && s.reign != nil && s.applied == s.last() {
			return s
		}
	}
	return nil
}

// drained says what is still to be done; nil when nothing is, and nothing ever
// will be unless somebody asks for more.
func (w *world) drained() error {
	s := w.ahead()
	if s == nil {
		return errors.New("no leader has committed all it has")
	}
	for _, p := range w.servers {
		if p.applied != s.applied {
			return fmt.Errorf("%s has applied %d of %d", p, p.applied, s.applied)
		}
	}
	snap := s.state.Snapshot()
	if snap.FleetHold(nil) != nil {
		return errors.New("replacements are paused")
	}
	for _, e := range snap.OpenEvals(nil) {
		if e.Status != cluster.EvalStatusBlocked {
			return fmt.Errorf("evaluation %s of job %s (%s) is %s%s", e.ID, e.JobID, e.TriggeredBy, e.Status, story(snap, e.JobKey()))
		}
	}
	for _, d := range snap.ActiveDeployments(nil) {
		if waits(snap, d) {
			continue
		}
		return fmt.Errorf("deployment %s of job %s is %s%s", d.ID, d.JobID, d.Status, story(snap, d.JobKey()))
	}
	for _, n := range w.nodes {
		if err := n.drained(snap); err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
	}
	for _, a := range snap.Allocs(nil, "") {
		if err := w.settled(snap, a); err != nil {
			return err
		}
	}
	for _, j := range snap.Jobs(nil, "*", "") {
		if err := w.satisfied(s, snap, j); err != nil {
			return err
		}
	}
	return nil
}

// waits says whether a deployment has groups that have placed nothing yet because there is no room, and no others than
// those whose canaries wait for its promotion: then it has no deadline.
func waits(snap *cluster.Snapshot, d *cluster.Deployment) bool {
	for _, g := range d.TaskGroups {
		canaries := g.Unpromoted() && g.HealthyAllocs >= g.DesiredCanaries
		if g.HealthyAllocs < g.DesiredTotal && g.RequireProgressBy != 0 && !canaries {
			return false
		}
	}
	return blocked(snap, d.JobKey()) != nil
}

// blocked is the evaluation of a job that waits for room, nil for none.
func blocked(snap *cluster.Snapshot, k cluster.JobKey) *cluster.Evaluation {
	for _, e := range snap.EvalsByJob(nil, k) {
		if e.Status == cluster.EvalStatusBlocked {
			return e
		}
	}
	return nil
}

// drained says whether a node is as the state has it.
func (n *node) drained(snap *cluster.Snapshot) error {
	r := snap.Node(nil, n.id)
	switch {
	case !n.agentUp || !n.attached:
		return errors.New("no agent is attached")
	case len(n.queue) > 0:
		return fmt.Errorf("%d reports wait", len(n.queue))
	case r == nil || r.Status != cluster.NodeStatusReady:
		return fmt.Errorf("the state has it as %+v", r)
	case r.Drain:
		for _, a := range snap.AllocsHolding(nil, n.id) {
			return fmt.Errorf("it drains (%+v), which waits for %s%s", *r.DrainStrategy, a.Name, story(snap, a.JobKey()))
		}
		return errors.New("it drains, though nothing is there")
	}
	said, record := cluster.Clone(r.NodeResources), cluster.Clone(n.record().NodeResources)
	for i, g := range said.Devices { // without what the rules add and an operator orders
		for k, d := range g.Instances {
			d.UnhealthySince = 0
			if i < len(record.Devices) && k < len(record.Devices[i].Instances) {
				own := record.Devices[i].Instances[k]
				if own.UnhealthySince = 0; r.DeviceOrders[d.ID] != nil {
					d.Healthy, d.HealthDescription = own.Healthy, own.HealthDescription
				}
			}
		}
	}
	if got, want := cluster.Marshal(said), cluster.Marshal(record); string(got) != string(want) {
		for i, g := range said.Devices {
			for k, d := range g.Instances {
				if i < len(record.Devices) && k < len(record.Devices[i].Instances) && !reflect.DeepEqual(d, record.Devices[i].Instances[k]) {
					return fmt.Errorf("the state has device %+v, the node %+v; orders %v", *d, *record.Devices[i].Instances[k], r.DeviceOrders[d.ID])
				}
			}
		}
		return errors.New("the state has other devices than the node")
	}
	for _, h := range n.sorted() {
		a := snap.Alloc(nil, h.alloc.ID)
		switch {
		case h.ended:
		case a == nil:
			return fmt.Errorf("%s (%s) runs, which the state does not know", h.alloc.Name, h.alloc.ID)
		case a.Terminal():
			return fmt.Errorf("%s (%s) runs, which is to be %s and known as %s", a.Name, a.ID, a.DesiredStatus, a.ClientStatus)
		case !h.running:
			return fmt.Errorf("%s (%s) does not run", a.Name, a.ID)
		}
	}
	return nil
}

// settled says whether an allocation is over, or runs where it should.
func (w *world) settled(snap *cluster.Snapshot, a *cluster.Allocation) error {
	if a.ClientTerminal() {
		return nil
	}
	for _, n := range w.nodes {
		if n.id != a.NodeID {
			continue
		}
		if h := n.allocs[a.ID]; h != nil && h.running && !a.ServerTerminal() && a.ClientStatus == cluster.AllocClientRunning {
			return nil
		}
	}
	return fmt.Errorf("allocation %s (%s) on node %s is %s, wanted: %s%s", a.Name, a.ID, a.NodeID, a.ClientStatus, a.DesiredStatus, story(snap, a.JobKey()))
}

// satisfied says whether a job has what it wants or a reason why not, and whether
// a fresh look by placement would leave it as it is.
func (w *world) satisfied(s *server, snap *cluster.Snapshot, j *cluster.Job) error {
	ids := 0
	probe := place.Input{
		Job: j, Now: s.clock(), NewID: func() string { ids++; return fmt.Sprintf("probe-%d", ids) },
		Eval: &cluster.Evaluation{
			ID: "probe", Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority, Status: cluster.EvalStatusPending,
			TriggeredBy: cluster.TriggerJobRegister,
		},
	}
	if r := place.NewView(snap).Plan(probe); !r.Empty() && !preemptsOnly(r.Plan) {
		return fmt.Errorf("job %s has settled, but a fresh evaluation would place %d, stop %d, and create the deployment %+v%s",
			j.ID, len(r.Plan.Place), len(r.Plan.Stop), r.Plan.Deployment, story(snap, j.Key()))
	}
	if j.Stop || j.Spawns() {
		return nil
	}
	if err := triedOut(snap, j); err != nil {
		return err
	}
	reason := ""
	if e := blocked(snap, j.Key()); e != nil {
		reason = e.StatusDescription
	}
	if d := snap.LatestDeployment(nil, j.Key()); d != nil && d.Status == cluster.DeploymentFailed && d.JobVersion == j.Version {
		reason = "its deployment failed"
	}
	if j.PerNode() {
		return everywhere(snap, j, reason)
	}
	for _, g := range j.TaskGroups {
		have, runs, gangFailed := map[string]bool{}, false, false
		for _, a := range snap.AllocsByJob(nil, j.Key()) {
			switch {
			case a.TaskGroup != g.Name || a.JobCreateIndex != j.CreateIndex:
			case !a.Terminal():
				have[a.Name], runs = true, true
			case j.Type == cluster.JobTypeBatch && a.ClientStatus == cluster.AllocClientComplete:
				have[a.Name] = true
			case a.ClientStatus == cluster.AllocClientFailed && a.NextAllocation == "": // no attempts left
				have[a.Name] = true
				gangFailed = true
			}
		}
		if g.Gang != nil {
			// One that waits to begin anew may have members that had ended well when another was lost.
			if runs && len(have) < g.Count && !gangFailed {
				return fmt.Errorf("gang %s of job %s has %d of its %d members%s", g.Name, j.ID, len(have), g.Count, story(snap, j.Key()))
			}
			if gangFailed { // and its other members were stopped
				continue
			}
		}
		if len(have) < g.Count && reason == "" {
			return fmt.Errorf("job %s group %s has %d of %d, and no reason is given%s", j.ID, g.Name, len(have), g.Count, story(snap, j.Key()))
		}
	}
	return nil
}

// preemptsOnly says whether a plan does no more than to preempt: work whose priority was lowered
// while it ran wakes nobody who might preempt it now.
func preemptsOnly(p *cluster.Plan) bool {
	return len(p.Place) == 0 && p.Deployment == nil && len(p.DeploymentUpdates) == 0 &&
		!slices.ContainsFunc(p.Stop, func(s *cluster.AllocStop) bool { return s.PreemptedBy == "" })
}

// everywhere says whether each node that may run a system job has one allocation of each
// group, or has done its work; reason is why one may lack it.
func everywhere(snap *cluster.Snapshot, j *cluster.Job, reason string) error {
	for _, g := range j.TaskGroups {
		live, over := map[string]int{}, map[string]bool{}
		for _, a := range snap.AllocsByJob(nil, j.Key()) {
			switch {
			case a.TaskGroup != g.Name || a.JobCreateIndex != j.CreateIndex:
			case !a.Terminal():
				live[a.NodeID]++
			case a.ClientStatus == cluster.AllocClientFailed, j.Finite() && a.ClientStatus == cluster.AllocClientComplete:
				over[a.NodeID] = over[a.NodeID] || a.JobVersion == j.Version
			}
		}
		for _, n := range snap.Nodes(nil, "") {
			if live[n.ID] > 1 {
				return fmt.Errorf("job %s group %s is %d times on node %s%s", j.ID, g.Name, live[n.ID], n.ID, story(snap, j.Key()))
			}
			if g.Count > 0 && n.Ready() && j.Covers(n) && suits(j, g, n) && live[n.ID] == 0 && !over[n.ID] && reason == "" {
				return fmt.Errorf("job %s group %s is not on node %s, and no reason is given%s", j.ID, g.Name, n.ID, story(snap, j.Key()))
			}
		}
	}
	return nil
}

// suits says whether a node meets what the users of a simulation ask of nodes, room aside.
func suits(j *cluster.Job, g *cluster.TaskGroup, n *cluster.Node) bool {
	for _, c := range j.Constraints {
		if c.Operand == "distinct_hosts" && len(j.TaskGroups) > 1 || c.LTarget == "${attr.rack}" && n.Attributes["rack"] == c.RTarget {
			return false
		}
	}
	for _, t := range g.Tasks {
		if d := n.Drivers[t.Driver]; d == nil || !d.Detected || !d.Healthy {
			return false
		}
		for _, d := range t.Resources.Devices {
			healthy := uint64(0)
			for _, g := range n.NodeResources.Devices {
				for _, i := range g.Instances {
					if i.Healthy {
						healthy++
					}
				}
			}
			if healthy < d.Count { // all are of one kind
				return false
			}
		}
	}
	return true
}

// story tells all that the state knows of a job, for whoever looks into a failure.
func story(snap *cluster.Snapshot, k cluster.JobKey) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, "\n  "+format, args...) }
	if j := snap.Job(nil, k); j != nil {
		line("job %s %s version %d (created %d, changed %d), stop %t, %s", j.Type, j.ID, j.Version, j.CreateIndex, j.JobModifyIndex, j.Stop, j.Status)
		for _, g := range j.TaskGroups {
			line("group %s count %d, update %+v, reschedule %+v, disconnect %+v", g.Name, g.Count, g.Update, g.ReschedulePolicy, g.Disconnect)
		}
	}
	nodes := map[string]bool{}
	for _, a := range snap.AllocsByJob(nil, k) {
		if nodes[a.NodeID] {
			continue
		}
		nodes[a.NodeID] = true
		if n := snap.Node(nil, a.NodeID); n != nil {
			line("node %s %s is %s, %s, drain %t (changed %d)", n.ID, n.Name, n.Status, n.SchedulingEligibility, n.Drain, n.ModifyIndex)
		} else {
			line("node %s is gone", a.NodeID)
		}
	}
	for _, d := range snap.DeploymentsByJob(nil, k) {
		line("deployment %s of version %d (created %d): %s, %s", d.ID, d.JobVersion, d.CreateIndex, d.Status, d.StatusDescription)
		for _, name := range slices.Sorted(maps.Keys(d.TaskGroups)) {
			line("  group %s %+v, progress due %s", name, *d.TaskGroups[name], d.TaskGroups[name].RequireProgressBy.Std())
		}
	}
	for _, a := range snap.AllocsByJob(nil, k) {
		healthy := "unknown"
		if s := a.DeploymentStatus; s != nil && s.Healthy != nil {
			healthy = fmt.Sprint(*s.Healthy)
		}
		line("allocation %s %s version %d of %d (created %d, changed %d) on %s: wanted %s (%s), known as %s, healthy %s in %q, next %q, transition %s, follow-up %q",
			a.ID, a.Name, a.JobVersion, a.JobCreateIndex, a.CreateIndex, a.ModifyIndex, a.NodeName, a.DesiredStatus, a.DesiredDescription, a.ClientStatus,
			healthy, a.DeploymentID, a.NextAllocation, wishes(a.DesiredTransition), a.FollowupEvalID)
	}
	for _, e := range snap.EvalsByJob(nil, k) {
		line("evaluation %s by %s (created %d, changed %d): %s, %s, queued %v, failed %d, due %s",
			e.ID, e.TriggeredBy, e.CreateIndex, e.ModifyIndex, e.Status, e.StatusDescription, e.QueuedAllocations, len(e.FailedTGAllocs), e.WaitUntil.Std())
	}
	return b.String()
}

func wishes(t cluster.DesiredTransition) string {
	b, _ := json.Marshal(t) // pointers to bool
	return string(b)
}
