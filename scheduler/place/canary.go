package place

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Canaries are allocations of a job's new version that run beside those of the old one, whose names they have, until
// their deployment is promoted (Nomad: update block, canary). Then the newer version holds the name, as ever, and the
// older one goes.

// trialOf says how many canaries the group has, or is to have, beside its old version. They begin with a version
// that nothing has run yet and that would have to replace something that runs.
// A gang has none: a part of it says nothing of the whole.
func (p *planner) trialOf(g *group, allocs []*cluster.Allocation) int {
	if g.spec.Gang != nil {
		return 0
	}
	if p.deployment != nil {
		if s := p.deployment.TaskGroups[g.name]; s.Unpromoted() {
			return s.DesiredCanaries
		}
		return 0
	}
	if !rolls(g) || p.job.Type != cluster.JobTypeService || slices.ContainsFunc(allocs, p.current) {
		return 0
	}
	if slices.ContainsFunc(allocs, func(a *cluster.Allocation) bool {
		i := nameIndex(a.Name)
		return i >= 0 && i < g.spec.Count && a.JobCreateIndex == p.job.CreateIndex && p.stateOf(a) == running && !a.Canary() && !p.updatable(g, a)
	}) {
		return g.spec.Update.Canary
	}
	return 0
}

// outlives says whether the allocation is of an older version that goes on until canaries are promoted: what of it
// fails meanwhile is replaced by its like.
func (p *planner) outlives(a *cluster.Allocation) bool {
	return p.trials[a.TaskGroup] && a.JobCreateIndex == p.job.CreateIndex && !p.current(a) && !a.Canary()
}

// tried is what a group has of canaries.
type tried struct {
	holders []named
	left    map[string]*cluster.Allocation // by name, the newest that left a gap
}

func newTried() *tried { return &tried{left: map[string]*cluster.Allocation{}} }

// sortCanary takes in a canary of the deployment under way; one of a deployment that has failed, or of an older
// version, ends.
func (p *planner) sortCanary(g *group, t *tried, c named) {
	mine := p.deployment != nil && p.deployment.Active() && c.DeploymentID == p.deployment.ID && g.trial > 0
	switch {
	case c.state == ignored:
	case c.state == leaving:
		if old := t.left[c.Name]; mine && (old == nil || old.CreateIndex < c.CreateIndex) {
			t.left[c.Name] = c.Allocation
		}
	case mine:
		t.holders = append(t.holders, c)
	default:
		p.drop(g, c, nil)
	}
}

// reconcileCanaries keeps, replaces and adds canaries as reconcileGroup does with the others.
func (p *planner) reconcileCanaries(g *group, t *tried, others []*cluster.Allocation) {
	holding := map[string]*cluster.Allocation{}
	var unheards []named
	for _, h := range sortHolders(g.spec.Disconnect, t.holders) {
		switch {
		case h.state == unheard:
			unheards = append(unheards, h)
		case holding[h.Name] != nil:
			p.drop(g, h, holding[h.Name])
		default:
			holding[h.Name] = h.Allocation
			p.keep(g, h)
		}
	}
	for _, h := range unheards {
		p.keepUnheard(g, h, holding[h.Name] != nil, t.left[h.Name])
		holding[h.Name] = h.Allocation
	}
	if p.halted() {
		return
	}
	for name, prev := range t.left {
		if holding[name] != nil {
			continue
		}
		w := want{name: name, prev: prev}
		if prev.DesiredDescription == descRescheduled {
			w.rescheduled = p.rescheduleEvent(prev)
		}
		g.wants, holding[name] = append(g.wants, w), prev
	}
	for _, name := range p.canaryNames(g, g.trial-len(holding), holding, others) {
		g.wants = append(g.wants, want{name: name, canary: true})
	}
}

// holdGang leaves out members of an older version that was a gang: one by one they would be half of it, and it cannot
// begin anew beside the canaries that are to take its names.
func (p *planner) holdGang(g *group) {
	had := len(g.wants)
	g.wants = slices.DeleteFunc(g.wants, func(w want) bool {
		of := p.versionOf(g, w)
		return of != p.job && of.Group(g.name).Gang != nil
	})
	g.held = g.held || len(g.wants) < had
}

// canaryNames gives n names for new canaries: those of what they are to replace first, then names that nobody has.
func (p *planner) canaryNames(g *group, n int, taken map[string]*cluster.Allocation, others []*cluster.Allocation) (names []string) {
	old := slices.Clone(g.destroy)
	slices.SortFunc(old, func(a, b *cluster.Allocation) int { return cmp.Compare(nameIndex(a.Name), nameIndex(b.Name)) })
	for _, a := range old {
		if len(names) < n && taken[a.Name] == nil {
			names = append(names, a.Name)
		}
	}
	for i := 0; len(names) < n; i++ {
		name := fmt.Sprintf("%s.%s[%d]", p.job.ID, g.name, i)
		if taken[name] == nil && (i >= len(others) || others[i] == nil) {
			names = append(names, name)
		}
	}
	return names
}

// versionOf is the version of the job that a want is for: the job's, or, until canaries are promoted, that of an
// older allocation which it takes the place of.
func (p *planner) versionOf(g *group, w want) *cluster.Job {
	if g.trial == 0 || w.prev == nil || w.prev.Canary() || p.current(w.prev) || w.prev.JobCreateIndex != p.job.CreateIndex {
		return p.job
	}
	if v := p.reader.JobVersion(nil, w.prev.JobKey(), w.prev.JobVersion); v != nil && v.CreateIndex == p.job.CreateIndex && v.Group(g.name) != nil {
		return v
	}
	return p.job
}
