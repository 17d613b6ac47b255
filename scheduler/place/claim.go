package place

import (
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// standing are the claims of one evaluation on one host, or its reservations. For evaluations that they
// bind, what of them nobody holds yet counts as in use.
type standing struct {
	job      cluster.JobKey
	priority int
	index    uint64       // of a reservation: where its evaluation stands within its priority
	from     cluster.Time // … and when it is to begin
	host     *host
	claims   []*cluster.Claim
	rest     *cluster.Allocation // what nobody holds yet
	counted  bool                // rest is among the host's
}

// stand takes claims of a job in place of those that it had.
func (v *View) stand(job cluster.JobKey, priority int, claims []*cluster.Claim) {
	v.standings = slices.DeleteFunc(v.standings, func(s *standing) bool {
		if s.job == job {
			v.countClaims(s, false)
		}
		return s.job == job
	})
	for _, c := range claims {
		h := v.byID[c.NodeID]
		if h == nil {
			continue
		}
		v.standings = join(v.standings, standing{job: job, priority: priority, host: h}, c)
	}
}

// join adds a claim to what its job has on the host, or the first one.
func join(list []*standing, s standing, c *cluster.Claim) []*standing {
	i := slices.IndexFunc(list, func(x *standing) bool { return x.job == s.job && x.host == s.host })
	if i < 0 {
		i, list = len(list), append(list, &s)
	}
	list[i].claims = append(list[i].claims, c)
	return list
}

// bind counts the claims that an evaluation has to keep off: those of other jobs, unless
// its priority is higher. And the reservations.
func (v *View) bind(in Input) {
	for _, s := range v.standings {
		v.countClaims(s, s.job != in.Eval.JobKey() && s.priority >= in.Eval.Priority)
	}
	v.bindReserves(in, runsUntil(in))
}

func (v *View) countClaims(s *standing, count bool) {
	switch {
	case count == s.counted:
	case count:
		v.load(s.host)
		if s.rest == nil {
			s.rest = v.restOf(s, nil)
		}
		v.plan(s.host, s.rest)
	default:
		v.unplan(s.host, s.rest)
	}
	s.counted = count
}

// restOf is what would be missing once those that the claims wait for have left: until
// then they hold the other part of what is claimed. Gone are the IDs of those that are taken to have left.
func (v *View) restOf(s *standing, gone []string) *cluster.Allocation {
	claimed, awaited := cluster.NewNodeUse(s.host.node), cluster.NewNodeUse(s.host.node)
	var awaits []string
	var ports []cluster.PortMapping
	for _, c := range s.claims {
		claimed.Add(&cluster.Allocation{ID: c.AllocID, AllocatedResources: c.Resources})
		awaits = append(awaits, c.Awaits...)
		for _, p := range c.Resources.Shared.Ports {
			if !s.host.use.Port(p.Value) {
				ports = append(ports, p)
			}
		}
	}
	for _, a := range slices.Concat(v.reader.AllocsHolding(nil, s.host.node.ID), s.host.planned) {
		if slices.Contains(awaits, a.ID) && !slices.Contains(gone, a.ID) {
			awaited.Add(a)
		}
	}
	rest := &cluster.AllocatedTaskResources{}
	rest.Cpu.CpuShares = max(0, claimed.CPU-awaited.CPU)
	rest.Memory.MemoryMB = max(0, claimed.Memory-awaited.Memory)
	for _, id := range sortedIDs(claimed.Devices) {
		c, a := claimed.Devices[id], awaited.Devices[id]
		if c.Whole > a.Whole {
			rest.Devices = append(rest.Devices, &cluster.AllocatedDevice{DeviceIDs: []string{id}})
		}
		if milli, mib := max(0, c.Milli-a.Milli), max(0, c.MiB-a.MiB); a.Whole == 0 && (milli > 0 || mib > 0) {
			rest.Devices = append(rest.Devices, &cluster.AllocatedDevice{DeviceIDs: []string{id}, Milli: milli, MiB: mib})
		}
	}
	r := &cluster.AllocatedResources{Tasks: map[string]*cluster.AllocatedTaskResources{"": rest}}
	r.Shared.DiskMB, r.Shared.Ports = max(0, claimed.Disk-awaited.Disk), ports
	return &cluster.Allocation{ID: s.claims[0].AllocID, AllocatedResources: r}
}

func sortedIDs(m map[string]cluster.DeviceUse) []string {
	ids := make([]string, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// heldClaims are the claims of the job's open evaluations that are still good for its
// version, by the name of the allocation to be.
func (p *planner) heldClaims() map[string]*cluster.Claim {
	claims := map[string]*cluster.Claim{}
	take := func(e *cluster.Evaluation) {
		for _, c := range e.Claims {
			if h := p.byID[c.NodeID]; p.job != nil && c.JobVersion == p.job.Version && h != nil && h.node.Ready() {
				claims[c.Name] = c
			}
		}
	}
	for _, e := range p.reader.OpenEvalsByJob(p.in.Eval.JobKey()) {
		take(e)
	}
	take(p.in.Eval)
	return claims
}

// waiting says whether something that a claim waits for has not ended yet.
func (p *planner) waiting(c *cluster.Claim) bool {
	return slices.ContainsFunc(p.reader.AllocsHolding(nil, c.NodeID), func(a *cluster.Allocation) bool { return slices.Contains(c.Awaits, a.ID) })
}

// redeem puts an allocation where a claim says, if all of it is free by now.
func (p *planner) redeem(g *group, nodes *search, c *cluster.Claim) *cluster.Allocation {
	h := p.byID[c.NodeID]
	if nodes.at[h.index] < 0 || p.excess(cluster.NewUsage(p.job.Namespace, c.Resources, p.job.Preemptible())) != nil {
		return nil
	}
	p.load(h)
	for _, port := range c.Resources.Shared.Ports {
		if h.use.Port(port.Value) {
			return nil
		}
	}
	a := &cluster.Allocation{ID: c.AllocID, AllocatedResources: c.Resources}
	h.use.Add(a)
	fault := h.use.Fault()
	h.use.Remove(a)
	if fault != "" {
		return nil
	}
	nodes.catchUp()
	k := &nodes.list[nodes.at[h.index]]
	metric := nodes.metrics(refusals{})
	metric.ScoreMetaData = []*cluster.NodeScore{{NodeID: h.node.ID, Scores: map[string]int64{}, Norm: int64(k.sum / max(k.applied, 1))}}
	placed := p.put(g, h, c.AllocID, c.Resources, metric)
	placed.PreemptedAllocations = c.Preempts
	return placed
}

// redeemGang gives all members of a gang the places that they have claims on; none if
// one of these is gone.
func (p *planner) redeemGang(g *group, nodes *search, claims []*cluster.Claim) (members []*cluster.Allocation) {
	for _, c := range claims {
		a := p.redeem(g, nodes, c)
		if a == nil {
			p.leaveAll(members)
			return nil
		}
		members = append(members, a)
	}
	return members
}

// claimsOf are the claims of all that a group wants, nil unless each has one.
func (p *planner) claimsOf(g *group) (claims []*cluster.Claim) {
	for _, w := range g.wants {
		c := p.held[w.name]
		if c == nil {
			return nil
		}
		claims = append(claims, c)
	}
	return claims
}
