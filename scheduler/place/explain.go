package place

import (
	"cmp"
	"maps"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// maxTried bounds the nodes over which it is tried what preempting could do: a trial weighs all that runs on each.
const maxTried = 2000

// maxExamples bounds the nodes that are named for a reason.
const maxExamples = 3

// Explain answers an evaluation as Plan does, and says what the answer comes from. in.Job is not nil.
// Evaluations, the queue and the quota's standing are for others to add.
func (v *View) Explain(in Input) *cluster.Explanation {
	p := v.answer(in)
	j := in.Job
	e := &cluster.Explanation{
		Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Version: j.Version, Priority: j.Priority, Stop: j.Stop,
		Index: v.index, Time: in.Now,
	}
	switch {
	case j.Periodic != nil:
		e.Spawns = "periodic"
	case j.Spawns():
		e.Spawns = "parameterized"
	}
	for _, g := range p.groups {
		s := p.standing(g)
		if g.spec == nil && s.Ending+s.Running+s.Starting+s.Unknown == 0 {
			continue // no more than history
		}
		e.Groups = append(e.Groups, s)
		e.Waits = append(e.Waits, p.waitsOf(g)...)
	}
	e.Preempts = p.evicts()
	e.Waits = append(p.waitsOfAll(), e.Waits...)
	return e
}

// standing says how a group stands, and, if something of it finds no place, why.
func (p *planner) standing(g *group) *cluster.GroupStanding {
	s := &cluster.GroupStanding{Name: g.name, Queued: p.result.Queued[g.name], Failure: p.result.Failed[g.name]}
	if g.spec != nil {
		s.Desired, s.Gang = g.spec.Count, g.spec.Gang != nil
		if g.nodes != nil {
			s.Desired = len(g.nodes.list)
		}
	}
	shares := map[string]*cluster.NodeShare{}
	for _, a := range p.allocs {
		if a.TaskGroup == g.name {
			p.stands(s, g, a, shares)
		}
	}
	s.Runs = slices.SortedFunc(maps.Values(shares), func(a, b *cluster.NodeShare) int {
		return cmp.Or(cmp.Compare(b.Allocs, a.Allocs), cmp.Compare(a.NodeName, b.NodeName), cmp.Compare(a.NodeID, b.NodeID))
	})
	s.Runs, s.MoreRuns = few(s.Runs)
	claimed := p.placesOf(g, s)
	if g.spec == nil {
		return s
	}
	if s.Queued <= claimed {
		s.Start = p.startSoon(g, s)
		return s
	}
	nodes := p.searchOf(g)
	p.countNodes(s, nodes)
	if s.Failure == nil || len(s.Failure.QuotaExhausted) > 0 {
		s.Start = new(cluster.Start)
		return s // it is not for want of room
	}
	p.findHolders(s, nodes)
	s.Start = p.startOf(g, s, nodes)
	for _, m := range p.missed {
		if m.group == g {
			s.Preempt = p.verdict(m)
			break
		}
	}
	return s
}

// few bounds a list, and says how many it leaves out.
func few[T any](list []T) ([]T, int) {
	n := min(len(list), cluster.MaxExplained)
	return list[:n], len(list) - n
}

// stands counts one allocation of a group.
func (p *planner) stands(s *cluster.GroupStanding, g *group, a *cluster.Allocation, shares map[string]*cluster.NodeShare) {
	switch {
	case a.ClientTerminal():
		if g.spec == nil {
			return
		}
		switch p.stateOf(a) {
		case done:
			s.Done++
		case failed:
			s.Failed++
		}
		return
	case a.ServerTerminal():
		s.Ending++
		return
	case a.ClientStatus == cluster.AllocClientUnknown:
		s.Unknown++
		return
	case a.ClientStatus == cluster.AllocClientRunning:
		s.Running++
	default:
		s.Starting++
	}
	n := shares[a.NodeID]
	if n == nil {
		n = &cluster.NodeShare{NodeID: a.NodeID, NodeName: a.NodeName, Since: beganAt(a)}
		shares[a.NodeID] = n
	}
	n.Allocs++
	n.Since = min(n.Since, beganAt(a))
}

// placesOf tells what the plan places of a group, and what it has claims on; it counts these.
func (p *planner) placesOf(g *group, s *cluster.GroupStanding) (claimed int) {
	add := func(name, nodeID string, r *cluster.AllocatedResources) *cluster.PlannedSeat {
		if len(s.Places) == cluster.MaxExplained {
			s.MorePlaces++
			return new(cluster.PlannedSeat)
		}
		seat := p.seatOf(name, nodeID, r)
		s.Places = append(s.Places, seat)
		return seat
	}
	for _, part := range p.result.Parts() {
		for _, a := range part.Place {
			if a.TaskGroup == g.name && a.CreateIndex == 0 {
				add(a.Name, a.NodeID, a.AllocatedResources).Scores = a.Metrics.ScoreMetaData
			}
		}
	}
	for _, c := range p.claims {
		if c.TaskGroup == g.name {
			claimed++
			seat := add(c.Name, c.NodeID, c.Resources)
			seat.Claim, seat.Awaits = true, len(p.awaited(c))
		}
	}
	return claimed
}

// awaited are the allocations that a claim waits for and that have not ended.
func (p *planner) awaited(c *cluster.Claim) []*cluster.Allocation {
	return slices.DeleteFunc(slices.Clone(p.reader.AllocsHolding(nil, c.NodeID)), func(a *cluster.Allocation) bool { return !slices.Contains(c.Awaits, a.ID) })
}

func (p *planner) seatOf(name, nodeID string, r *cluster.AllocatedResources) *cluster.PlannedSeat {
	s := &cluster.PlannedSeat{Name: name, NodeID: nodeID}
	h := p.byID[nodeID]
	if h != nil {
		s.NodeName = h.node.Name
	}
	var cpu, memory cluster.Overlap
	for _, task := range slices.Sorted(maps.Keys(r.Tasks)) {
		t := r.Tasks[task]
		cpu.Add(r.TaskLifecycles[task], t.Cpu.CpuShares)
		memory.Add(r.TaskLifecycles[task], t.Memory.MemoryMB)
		for _, d := range t.Devices {
			for _, id := range d.DeviceIDs {
				s.Devices = append(s.Devices, &cluster.SeatDevice{ID: id, Kind: d.Vendor + "/" + d.Type + "/" + d.Name, Ordinal: ordinal(h, d, id), Milli: d.Milli, MiB: d.MiB})
			}
		}
	}
	s.CPU, s.MemoryMB = cpu.Most(), memory.Most()
	for _, port := range r.Shared.Ports {
		s.Ports = append(s.Ports, port.Value)
	}
	return s
}

// ordinal is a device's number among those of its vendor and type on its node.
func ordinal(h *host, d *cluster.AllocatedDevice, id string) (n int) {
	if h == nil {
		return 0
	}
	for _, g := range h.node.NodeResources.Devices {
		if g.Vendor != d.Vendor || g.Type != d.Type {
			continue
		}
		for _, x := range g.Instances {
			if x.ID == id {
				return n
			}
			n++
		}
	}
	return 0
}

// evicts are the allocations that the plan preempts.
func (p *planner) evicts() (out []*cluster.Victim) {
	names := map[string]string{}
	for _, c := range p.claims {
		names[c.AllocID] = c.Name
	}
	for _, part := range p.result.Parts() {
		for _, s := range part.Stop {
			if a := p.alloc(s.AllocID); s.PreemptedBy != "" && a != nil {
				v := p.victim(a)
				v.For = names[s.PreemptedBy]
				out = append(out, v)
			}
		}
	}
	return out
}

// alloc finds an allocation that claims of the plan, or others, wait for.
func (p *planner) alloc(id string) *cluster.Allocation {
	for _, told := range p.result.Annotations.PreemptedAllocs {
		if told.ID != id {
			continue
		}
		for _, a := range p.reader.AllocsByJob(nil, cluster.JobKey{Namespace: told.Namespace, ID: told.JobID}) {
			if a.ID == id {
				return a
			}
		}
	}
	return nil
}

func (p *planner) victim(a *cluster.Allocation) *cluster.Victim {
	v := &cluster.Victim{
		AllocID: a.ID, Name: a.Name, Namespace: a.Namespace, JobID: a.JobID, Group: a.TaskGroup, NodeID: a.NodeID, NodeName: a.NodeName,
		Since: beganAt(a), LostSeconds: p.occupantOf(a).lost(p.in.Now), Milli: devicesOf(a),
	}
	if j := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion); j != nil {
		v.Priority = j.Priority
	}
	for _, task := range slices.Sorted(maps.Keys(a.Checkpoints)) {
		if c := a.Checkpoints[task]; v.Checkpoint == nil || c.Time > v.Checkpoint.Time {
			v.Checkpoint = c
		}
	}
	return v
}

// waitsOfAll is what keeps the whole job waiting.
func (p *planner) waitsOfAll() (out []*cluster.Wait) {
	if p.config.PauseEvalBroker {
		out = append(out, &cluster.Wait{Kind: cluster.WaitPaused})
	}
	if p.paused {
		out = append(out, &cluster.Wait{Kind: cluster.WaitHold, Why: p.freeze.Reason})
	}
	if p.waits != "" && p.lacks() {
		out = append(out, &cluster.Wait{Kind: cluster.WaitChildren, Why: p.waits})
	}
	if p.quota != "" {
		out = append(out, &cluster.Wait{Kind: cluster.WaitQuota, Why: p.quota})
	}
	if p.deferred || p.requeued {
		out = append(out, &cluster.Wait{Kind: cluster.WaitEnds})
	}
	for _, e := range p.followups {
		if e.TriggeredBy == cluster.TriggerPreemption || e.TriggeredBy == cluster.TriggerRollingUpdate {
			out = append(out, &cluster.Wait{Kind: cluster.WaitDelay, Until: e.WaitUntil, Why: e.StatusDescription})
		}
	}
	if d := p.deployment; d != nil && p.halted() {
		out = append(out, &cluster.Wait{Kind: cluster.WaitHalted, ID: d.ID, Why: d.Status + ": " + d.StatusDescription})
	}
	return out
}

// waitsOf is what keeps a group waiting, beside room and beside what the whole job waits for.
func (p *planner) waitsOf(g *group) (out []*cluster.Wait) {
	if len(g.later) > 0 {
		at := g.later[0].at
		for _, l := range g.later {
			at = min(at, l.at)
		}
		out = append(out, &cluster.Wait{Kind: cluster.WaitDelay, Group: g.name, Until: at, Why: DescDelayed})
	}
	var leave []*cluster.Victim
	told := map[string]bool{}
	for _, c := range p.claims {
		if c.TaskGroup != g.name {
			continue
		}
		for _, a := range p.awaited(c) {
			if !told[a.ID] {
				told[a.ID] = true
				v := p.victim(a)
				v.For = c.Name
				leave = append(leave, v)
			}
		}
	}
	if len(leave) > 0 {
		w := &cluster.Wait{Kind: cluster.WaitClaims, Group: g.name, Why: DescClaims}
		w.Awaits, w.More = few(leave)
		out = append(out, w)
	}
	if d := p.deployment; d != nil && d.Active() && !p.halted() && d.TaskGroups[g.name] != nil {
		switch {
		case g.trial > 0 && !d.TaskGroups[g.name].AutoPromote:
			out = append(out, &cluster.Wait{Kind: cluster.WaitPromote, Group: g.name, ID: d.ID, Why: d.StatusDescription})
		case g.trial > 0, len(g.destroy) > int(g.counts.DestructiveUpdate):
			out = append(out, &cluster.Wait{Kind: cluster.WaitHealth, Group: g.name, ID: d.ID, Why: d.StatusDescription})
		}
	}
	return out
}

// searchOf gives the nodes for a group that lacks something, as they are after the plan.
func (p *planner) searchOf(g *group) *search {
	for _, m := range p.missed {
		if m.group == g {
			return m.nodes
		}
	}
	if g.nodes != nil {
		return g.nodes
	}
	return p.newSearch(p.job, g.spec)
}

// countNodes counts all nodes by what keeps the group off, and those that it can never run on by why.
func (p *planner) countNodes(s *cluster.GroupStanding, nodes *search) {
	p.tally()
	nodes.catchUp()
	c := &cluster.NodeCounts{Total: len(p.hosts), NotReady: map[string]int{}}
	s.Nodes = c
	filters := map[string]*cluster.NodeReason{}
	against := func(reason string, h *host) {
		c.Filtered++
		f := filters[reason]
		if f == nil {
			f = &cluster.NodeReason{Reason: reason}
			filters[reason] = f
		}
		f.Nodes++
		f.Examples = example(f.Examples, h)
	}
	pool := nodePool(p.job.NodePool)
	for i, h := range p.hosts {
		n := h.node
		switch why := notReady(n); {
		case why != "":
			c.NotReady[why]++
		case !n.InPool(pool):
			c.OtherPool++
		case !cluster.InDatacenters(p.job.Datacenters, n.Datacenter):
			c.OtherCenter++
		case nodes.at[i] < 0:
			against(nodes.demand.filter(n), h)
		default:
			switch r := nodes.refusal(i, p.onJob.on(i), p.onGroup[s.Name].on(i)); {
			case r == refusedHosts:
				against(operandDistinctHosts, h)
			case r != admitted:
				against(operandDistinctProperty, h)
			case nodes.list[nodes.at[i]].exhausted != "":
				c.Full++
			default:
				c.Free++
			}
		}
		if notReady(n) == "" && n.InPool(pool) {
			p.unfitOn(s, nodes.demand, h)
		}
	}
	s.Unfit, s.MoreUnfit = few(s.Unfit)
	s.Filters = slices.SortedFunc(maps.Values(filters), func(a, b *cluster.NodeReason) int {
		return cmp.Or(cmp.Compare(b.Nodes, a.Nodes), cmp.Compare(a.Reason, b.Reason))
	})
	s.Filters, _ = few(s.Filters)
}

func example(names []string, h *host) []string {
	if len(names) < maxExamples {
		names = append(names, cmp.Or(h.node.Name, h.node.ID))
	}
	return names
}

// notReady says why a node takes no new work, "" when it does.
func notReady(n *cluster.Node) string {
	switch {
	case n.Status != cluster.NodeStatusReady:
		return n.Status
	case n.Drain:
		return "draining"
	case n.SchedulingEligibility != cluster.NodeEligible:
		return cluster.NodeIneligible
	case n.NodeResources == nil:
		return cluster.NodeStatusInit
	}
	return ""
}

// unfitOn notes a node's devices that the group could use if they were in use.
func (p *planner) unfitOn(s *cluster.GroupStanding, d *demand, h *host) {
	for _, g := range h.node.NodeResources.Devices {
		if !slices.ContainsFunc(d.devices, func(a deviceAsk) bool { return a.means(g, d.patterns) }) {
			continue
		}
		for _, x := range g.Instances {
			if x.Healthy {
				continue
			}
			u := &cluster.UnfitDevice{NodeID: h.node.ID, NodeName: h.node.Name, DeviceID: x.ID, Why: x.HealthDescription}
			if o := h.node.DeviceOrders[x.ID]; o != nil && o.Order == cluster.DeviceCordon {
				u.Order, u.Why = o.Order, o.Reason
			}
			s.Unfit = append(s.Unfit, u)
		}
	}
}

// means says whether the ask could be served by devices of a group, whatever state they are in.
func (a *deviceAsk) means(g *cluster.NodeDeviceResource, patterns patternCache) bool {
	return deviceNamed(a.name, g) && !slices.ContainsFunc(a.constraints, func(c *cluster.Constraint) bool { return !deviceHolds(c, g, patterns) })
}

// verdict says whether preempting could make room for what a group lacks first, and what stands in the way.
func (p *planner) verdict(m missing) *cluster.PreemptVerdict {
	v := &cluster.PreemptVerdict{}
	switch c := p.config.PreemptionConfig; {
	case p.job.AllAtOnce:
		v.Obstacles = append(v.Obstacles, &cluster.Obstacle{Kind: cluster.ObstacleAllAtOnce})
	case p.job.PerNode():
		v.Obstacles = append(v.Obstacles, &cluster.Obstacle{Kind: cluster.ObstacleType, What: p.job.Type})
		return v
	case p.job.Type == cluster.JobTypeService && !c.ServiceSchedulerEnabled, p.job.Type == cluster.JobTypeBatch && !c.BatchSchedulerEnabled:
		v.Obstacles = append(v.Obstacles, &cluster.Obstacle{Kind: cluster.ObstacleSwitch, What: p.job.Type})
	}
	if v.TooLarge = len(m.nodes.list) > maxTried; v.TooLarge {
		return v
	}
	for e := easeNothing; e <= easePriority; e++ {
		t := p.newTrial(m.group, m.nodes, true)
		t.ease = e
		if !t.run(m.wants) {
			continue
		}
		t.uncount()
		if v.Helps = len(t.units) > 0; v.Helps {
			p.tellUnits(v, t)
		}
		break
	}
	return v
}

// tellUnits names what would have to leave, and why it may not.
func (p *planner) tellUnits(v *cluster.PreemptVerdict, t *trial) {
	shields := map[string]*cluster.Obstacle{}
	for _, u := range t.units {
		for _, a := range u.members {
			if len(v.Victims) < cluster.MaxExplained {
				v.Victims = append(v.Victims, p.victim(a))
			}
			if o := p.occupantOf(a); o.job != nil {
				kind, until := p.shield(o, t.owed)
				obstruct(shields, kind, until)
			}
		}
	}
	v.Obstacles = append(v.Obstacles, obstacles(shields)...)
}

// obstruct counts an allocation by what keeps it from being preempted.
func obstruct(shields map[string]*cluster.Obstacle, kind string, until cluster.Time) {
	if kind == "" {
		return
	}
	o := shields[kind]
	if o == nil {
		o = &cluster.Obstacle{Kind: kind, Until: until}
		shields[kind] = o
	}
	o.Allocs++
	o.Until = min(o.Until, until)
}

func obstacles(shields map[string]*cluster.Obstacle) []*cluster.Obstacle {
	return slices.SortedFunc(maps.Values(shields), func(a, b *cluster.Obstacle) int {
		return cmp.Or(cmp.Compare(b.Allocs, a.Allocs), cmp.Compare(a.Kind, b.Kind))
	})
}
