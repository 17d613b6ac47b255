package place

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// startSoon is when what a group lacks begins if it lacks no room: now, or when those have left that its claims wait
// for; nil when it lacks nothing.
func (p *planner) startSoon(g *group, s *cluster.GroupStanding) *cluster.Start {
	if len(s.Places) == 0 {
		return nil
	}
	start := &cluster.Start{Now: s.Queued == 0}
	for _, c := range p.claims {
		if c.TaskGroup != g.name {
			continue
		}
		for _, a := range p.awaited(c) {
			start.At = max(start.At, p.in.Now.Add(p.leaves(a)))
		}
	}
	start.Now = start.At == 0
	return start
}

// leaves is how long an allocation takes at most to end that was told to, its notice included.
func (p *planner) leaves(a *cluster.Allocation) time.Duration {
	job := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion)
	if job == nil || job.Group(a.TaskGroup) == nil {
		return 0
	}
	g := job.Group(a.TaskGroup)
	if evicted(a) || p.evictions[a.ID] {
		return g.PreemptGrace()
	}
	return g.EndTakes()
}

// startOf is when what finds no room would, going by what others say of their run times.
func (p *planner) startOf(g *group, s *cluster.GroupStanding, nodes *search) *cluster.Start {
	if p.job.PerNode() {
		return p.unknown(s)
	}
	n := 1
	if s.Gang || p.job.AllAtOnce {
		n = len(g.wants)
	}
	if !p.everFits(nodes, n) {
		return &cluster.Start{Never: true}
	}
	seats, _ := p.foresee(g, n, nil)
	if seats == nil {
		return p.unknown(s)
	}
	start := &cluster.Start{At: latest(seats)}
	if start.At <= p.in.Now {
		return &cluster.Start{Now: true}
	}
	jobs, told := map[cluster.JobKey]*cluster.Holder{}, map[string]bool{}
	for _, seat := range seats {
		for _, d := range p.departures(seat.host, p.in.Now) {
			if d.at > start.At || told[d.alloc.ID] {
				continue
			}
			told[d.alloc.ID] = true
			h := jobs[d.alloc.JobKey()]
			if h == nil {
				h = &cluster.Holder{Namespace: d.alloc.Namespace, JobID: d.alloc.JobID, Since: beganAt(d.alloc), Own: d.alloc.JobKey() == p.job.Key()}
				if j := p.reader.JobVersion(nil, d.alloc.JobKey(), d.alloc.JobVersion); j != nil {
					h.Priority = j.Priority
				}
				jobs[d.alloc.JobKey()] = h
			}
			h.Allocs, h.Milli, h.Until, h.Since = h.Allocs+1, h.Milli+devicesOf(d.alloc), max(h.Until, d.at), min(h.Since, beganAt(d.alloc))
		}
	}
	start.Because = slices.SortedFunc(maps.Values(jobs), func(a, b *cluster.Holder) int {
		return cmp.Or(cmp.Compare(b.Until, a.Until), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.JobID, b.JobID))
	})
	start.Because, _ = few(start.Because)
	return start
}

// unknown is a start of which those who hold what is short say nothing.
func (p *planner) unknown(s *cluster.GroupStanding) *cluster.Start {
	start := new(cluster.Start)
	for _, h := range s.Holders {
		if h.Until == 0 && !h.Claim {
			start.Because = append(start.Because, h)
		}
	}
	return start
}

// everFits says whether the nodes could hold n of a demand if nothing ran on them.
func (p *planner) everFits(nodes *search, n int) bool {
	for i := range nodes.list {
		h := nodes.list[i].host
		if n -= nodes.room(h.with(cluster.NewNodeUse(h.node)), n); n <= 0 {
			return true
		}
	}
	return false
}
