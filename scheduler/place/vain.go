package place

import (
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// attempt is one kind of trial for a demand.
type attempt struct {
	priority int
	owed     bool
}

// futility is what is remembered of a trial that did not find even one place. It is as futile for all work that demands
// the same, in this view and in later ones, until something has changed that it depended on.
type futility struct {
	known     moment            // the changes of hosts since then have not been looked at
	protected cluster.Time      // as the trial's
	protector string            // …
	lent      map[string]string // what namespaces had borrowed, where that mattered
	elsewhere bool              // it depends on more than the hosts one by one
}

// remembers says whether trials of this plan are the same as those of other work that demands the same: a job that holds something
// already may gain by its own changes, or be in its own way.
func (p *planner) remembers(m missing) bool {
	return !slices.ContainsFunc(p.allocs, (*cluster.Allocation).Occupies) && len(p.result.Plan.Place) == 0 && len(p.result.Earlier) == 0 && len(p.claims) == 0 &&
		len(m.nodes.limits) == 0 && len(p.in.Eval.Claims) == 0
}

// isVain says whether what is missing has been tried for other work, and when the first would be free to be preempted
// that is not yet.
func (p *planner) isVain(m missing) (until cluster.Time, vain bool) {
	if !p.remembers(m) {
		return 0, false
	}
	t := p.newTrial(m.group, m.nodes, true)
	t.owed = p.owed(m.group, len(m.wants))
	f := m.nodes.vain[t.attempt()]
	if f == nil || !f.stands(t) {
		return 0, false
	}
	return f.protected, true
}

// wasVain remembers a trial that found no place for even one, unless that may be due to what only this job asks for.
func (p *planner) wasVain(m missing, t *trial) {
	gang := m.group.spec.Gang
	if !p.remembers(m) || len(t.claims) > 0 || gang != nil && gang.Required && len(gang.Topology) > 0 {
		return
	}
	f := &futility{lent: map[string]string{}}
	f.learn(t)
	t.nodes.vain[t.attempt()] = f
}

func (t *trial) attempt() attempt { return attempt{t.job.Priority, t.owed} }

// learn takes over what a trial has found, up to now.
func (f *futility) learn(t *trial) {
	f.known, f.elsewhere = t.moment(), f.elsewhere || t.elsewhere
	if t.protected != 0 && (f.protected == 0 || t.protected < f.protected) {
		f.protected, f.protector = t.protected, t.protector
	}
	for _, n := range t.lenders {
		f.lent[n] = t.debts(n)
	}
}

// stands says whether a trial would still be futile. It looks only where something has changed.
func (f *futility) stands(t *trial) bool {
	t.lowestRanks() // which finds out what has changed
	since, known := t.since(f.known)
	if !known || f.protected != 0 && f.protected <= t.in.Now || f.elsewhere && len(since) > 0 {
		return false
	}
	for n, was := range f.lent {
		if t.debts(n) != was {
			return false
		}
	}
	if len(since) == 0 {
		return true
	}
	t.nodes.catchUp()
	hosts := slices.Clone(since)
	slices.Sort(hosts)
	for _, i := range slices.Compact(hosts) {
		if h := t.View.hosts[i]; h.node.ID == f.protector || t.hopes(h) {
			return false
		}
	}
	if t.elsewhere {
		return false
	}
	f.learn(t)
	return true
}

// hopes says whether a host has room for one, or would have once others have left it.
func (t *trial) hopes(h *host) bool {
	at := t.nodes.at[h.index]
	if at < 0 {
		return false
	}
	if _, may := t.least(&t.nodes.list[at]); !may {
		return false
	}
	return t.nodes.demand.exhausted(t.host(h).host) == "" || t.cheapest(h) != nil
}

// asks notes that it matters what a namespace has borrowed.
func (t *trial) asks(namespace string) {
	if !slices.Contains(t.lenders, namespace) {
		t.lenders = append(t.lenders, namespace)
	}
}

// debts names what a namespace has borrowed, whatever how much of it.
func (v *View) debts(namespace string) string {
	var names []string
	for _, b := range v.borrowed(namespace) {
		names = append(names, b.Name)
	}
	return strings.Join(names, "\x00")
}
