package cluster

import (
	"errors"
	"fmt"
	"maps"
)

// Check walks the whole state and reports every broken invariant: no device or
// port held twice, no node over-committed, summaries, deployments, versions and
// indexes true. It runs after every restore and every simulated step.
func (s *Snapshot) Check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	high := s.Index(nil)
	counts := map[JobKey]map[string]TaskGroupSummary{}
	byNode := map[string][]*Allocation{}
	for _, a := range s.Allocs(nil, "") {
		if a.ModifyIndex > high {
			fault("allocation %s has index %d, beyond the state's %d", a.ID, a.ModifyIndex, high)
		}
		if (a.ClientStatus == AllocClientUnknown) != (a.UnknownSince != 0) {
			fault("allocation %s is %s, and unknown since %d", a.ID, a.ClientStatus, a.UnknownSince)
		}
		if a.Occupies() {
			byNode[a.NodeID] = append(byNode[a.NodeID], a)
			if s.JobVersion(nil, a.JobKey(), a.JobVersion) == nil {
				fault("allocation %s runs version %d of job %s, which is not kept", a.ID, a.JobVersion, a.JobID)
			}
		}
		if j := s.Job(nil, a.JobKey()); j != nil && j.CreateIndex == a.JobCreateIndex {
			if counts[j.Key()] == nil {
				counts[j.Key()] = map[string]TaskGroupSummary{}
			}
			g := counts[j.Key()][a.TaskGroup]
			g.add(a.ClientStatus, 1)
			counts[j.Key()][a.TaskGroup] = g
		}
	}
	for _, nodeID := range sortedKeys(byNode) {
		n := s.Node(nil, nodeID)
		if n == nil {
			continue // purged: the scheduler marks its allocations lost
		}
		use := NewNodeUse(n)
		for _, a := range byNode[nodeID] {
			use.Add(a)
		}
		for _, f := range use.faults { // held twice; a node may shrink below its use, but never share
			fault("node %s: %s", nodeID, f)
		}
	}
	for _, j := range s.Jobs(nil, "*", "") {
		if v := s.JobVersion(nil, j.Key(), j.Version); v == nil || !SpecEqual(v, j) {
			fault("job %s: version %d is not kept as it is", j.ID, j.Version)
		}
		if status := s.jobStatus(j); status != j.Status {
			fault("job %s is %s but its allocations and evaluations say %s", j.ID, j.Status, status)
		}
		sum := s.Summary(nil, j.Key())
		if sum == nil {
			fault("job %s has no summary", j.ID)
			continue
		}
		kept := maps.Clone(sum.Summary)
		for name, g := range kept {
			g.Queued = 0
			kept[name] = g
		}
		for _, name := range sortedKeys(kept) {
			g := counts[j.Key()][name]
			if kept[name] != g && !reaped(kept[name], g) {
				fault("job %s group %s: summary says %+v, allocations say %+v", j.ID, name, kept[name], g)
			}
		}
	}
	for _, m := range s.Models(nil) {
		for alias, v := range m.Aliases {
			if s.ModelVersion(nil, m.Name, v) == nil {
				fault("model %s: alias %s points at version %d, which is not there", m.Name, alias, v)
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
	return errors.Join(faults...)
}

// reaped says whether a summary differs from the allocations only by terminal
// ones that were collected: history stays in the summary.
func reaped(sum, now TaskGroupSummary) bool {
	return sum.Running == now.Running && sum.Starting == now.Starting && sum.Unknown == now.Unknown &&
		sum.Complete >= now.Complete && sum.Failed >= now.Failed && sum.Lost >= now.Lost
}
