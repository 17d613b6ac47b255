package cluster

import (
	"errors"
	"fmt"
)

// Check walks the whole state and reports every broken invariant: no device or
// port held twice, no node over-committed, summaries, deployments, versions and
// indexes true. It runs after every restore and every simulated step.
func (s *Snapshot) Check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	high := s.Index(nil)
	s.checkNodes(s.checkJobs(high, fault), fault)
	for _, m := range s.Models(nil) {
		for alias, v := range m.Aliases {
			if s.ModelVersion(nil, m.Name, v) == nil {
				fault("model %s: alias %s points at version %d, which is not there", m.Name, alias, v)
			}
		}
		for _, v := range s.ModelVersions(nil, m.Name) {
			if o := v.Origin; o != nil && o.AllocID != "" && s.Alloc(nil, o.AllocID) == nil {
				fault("model %s version %d: its origin, allocation %s, is gone", m.Name, v.Version, o.AllocID)
			}
		}
		if s.ModelVersion(nil, m.Name, m.LatestVersion) == nil {
			fault("model %s: newest version %d is not there", m.Name, m.LatestVersion)
		}
	}
	for _, d := range s.Deployments(nil, "") {
		for name, g := range d.TaskGroups {
			if g.HealthyAllocs > g.PlacedAllocs {
				fault("deployment %s group %s: %d healthy of %d placed", d.ID, name, g.HealthyAllocs, g.PlacedAllocs)
			}
		}
	}
	s.checkACL(high, fault)
	s.checkIntro(high, fault)
	s.checkTenants(high, fault)
	return errors.Join(faults...)
}

// checkJobs looks at all allocations job by job, and at the jobs. It gives the number of allocations that hold something.
func (s *Snapshot) checkJobs(high uint64, fault func(string, ...any)) (holding int) {
	allocs, jobs := s.txn.rows[tableByName[TableAllocs].number], s.txn.rows[tableByName[TableJobs].number]
	byJob := allocs.by[newQuery(TableAllocs, "job", nil).by]
	counts, kept, seen := map[string]TaskGroupSummary{}, map[uint64]bool{}, 0
	children := map[JobKey]ChildrenSummary{}
	jobs.ids.ascend("", func(_ string, at slot) bool {
		if j := jobs.records.get(at).(*Job); j.ParentID != "" {
			c := children[j.parent()]
			c.add(j.Status, 1)
			children[j.parent()] = c
		}
		return true
	})
	byJob.ascend("", func(key string, x *set) bool {
		j, _ := jobs.get(key).(*Job)
		clear(counts)
		clear(kept)
		x.each(func(at slot) bool {
			a := allocs.records.get(at).(*Allocation)
			seen++
			if a.ModifyIndex > high {
				fault("allocation %s has index %d, beyond the state's %d", a.ID, a.ModifyIndex, high)
			}
			if (a.ClientStatus == AllocClientUnknown) != (a.UnknownSince != 0) {
				fault("allocation %s is %s, and unknown since %d", a.ID, a.ClientStatus, a.UnknownSince)
			}
			if a.Occupies() {
				holding++
			}
			if a.Occupies() && !kept[a.JobVersion] {
				if kept[a.JobVersion] = s.JobVersion(nil, a.JobKey(), a.JobVersion) != nil; !kept[a.JobVersion] {
					fault("allocation %s runs version %d of job %s, which is not kept", a.ID, a.JobVersion, a.JobID)
				}
			}
			if j != nil && j.CreateIndex == a.JobCreateIndex {
				g := counts[a.TaskGroup]
				g.add(a.ClientStatus, 1)
				counts[a.TaskGroup] = g
			}
			return true
		})
		if j != nil {
			s.checkJob(j, counts, children[j.Key()], fault)
		}
		return true
	})
	if seen != allocs.ids.n {
		fault("%d of %d allocations are found by their jobs", seen, allocs.ids.n)
	}
	jobs.ids.ascend("", func(key string, at slot) bool {
		if _, ok := byJob.get(key); !ok {
			j := jobs.records.get(at).(*Job)
			s.checkJob(j, nil, children[j.Key()], fault)
		}
		return true
	})
	return holding
}

// checkJob compares a job with what its allocations and children count up to.
func (s *Snapshot) checkJob(j *Job, counts map[string]TaskGroupSummary, children ChildrenSummary, fault func(string, ...any)) {
	if v := s.JobVersion(nil, j.Key(), j.Version); v == nil || !SpecEqual(v, j) {
		fault("job %s: version %d is not kept as it is", j.ID, j.Version)
	}
	if status := s.jobStatus(j); status != j.Status {
		fault("job %s is %s but its allocations and evaluations say %s", j.ID, j.Status, status)
	}
	if (j.Periodic != nil) != (s.Launch(nil, j.Key()) != nil) {
		fault("job %s is periodic: %v, but the record of its launches: %v", j.ID, j.Periodic != nil, j.Periodic == nil)
	}
	sum := s.Summary(nil, j.Key())
	if sum == nil {
		fault("job %s has no summary", j.ID)
		return
	}
	switch said := sum.Children; {
	case (said != nil) != j.Spawns():
		fault("job %s has children: %v, but its summary counts them: %v", j.ID, j.Spawns(), said != nil)
	case said != nil && (said.Pending != children.Pending || said.Running != children.Running || said.Dead < children.Dead):
		fault("job %s: summary says %+v of its children, they are %+v", j.ID, *said, children)
	}
	for _, name := range sortedKeys(sum.Summary) {
		said, is := sum.Summary[name], counts[name]
		if said.Queued = 0; said != is && !reaped(said, is) {
			fault("job %s group %s: summary says %+v, allocations say %+v", j.ID, name, said, is)
		}
	}
}

// checkNodes looks that nothing of a node is held twice. A node may shrink below its use, but never share.
func (s *Snapshot) checkNodes(holding int, fault func(string, ...any)) {
	allocs := s.txn.rows[tableByName[TableAllocs].number]
	byNode := &allocs.by[newQuery(TableAllocs, "holds", nil).by]
	byNode.ascend("", func(nodeID string, x *set) bool {
		n := s.Node(nil, nodeID)
		use := NewNodeUse(n)
		x.each(func(at slot) bool {
			a := allocs.records.get(at).(*Allocation)
			if holding--; !a.Occupies() || a.NodeID != nodeID {
				fault("allocation %s is found among those that hold something of node %s", a.ID, nodeID)
			}
			if n != nil { // else it was purged, and the scheduler marks its allocations lost
				use.Add(a)
			}
			return true
		})
		for _, f := range use.conflicts() {
			fault("node %s: %s", nodeID, f)
		}
		return true
	})
	if holding != 0 {
		fault("%d allocations that hold something are not found by their nodes", holding)
	}
}

// reaped says whether a summary differs from the allocations only by terminal
// ones that were collected: history stays in the summary.
func reaped(sum, now TaskGroupSummary) bool {
	return sum.Running == now.Running && sum.Starting == now.Starting && sum.Unknown == now.Unknown &&
		sum.Complete >= now.Complete && sum.Failed >= now.Failed && sum.Lost >= now.Lost
}
