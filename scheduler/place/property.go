package place

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/rxvision/rxvision/cluster"
)

// maxProperties bounds the attributes whose values a Cache keeps for all nodes.
const maxProperties = 64

// maxValuesNamed bounds the values of one property that a reason names; what more
// there is counts as operandDistinctProperty.
const maxValuesNamed = 10

// property is one attribute of all hosts, such as ${meta.rack}.
type property struct {
	target string
	values []string // that hosts have for it
	of     []int32  // by index of the host: its place in values, -1 when the host has none
}

// property reads an attribute of all hosts, once until there are other nodes.
func (c *Cache) property(target string) *property {
	if p := c.properties[target]; p != nil {
		return p
	}
	if c.properties == nil || len(c.properties) >= maxProperties {
		c.properties = map[string]*property{}
	}
	p := &property{target: target, of: make([]int32, len(c.hosts))}
	places := map[string]int32{}
	for i, h := range c.hosts {
		v, found := nodeLookup(h.node)(target)
		if !found {
			p.of[i] = -1
			continue
		}
		place, known := places[v]
		if !known {
			place = int32(len(p.values))
			places[v], p.values = place, append(p.values, v)
		}
		p.of[i] = place
	}
	c.properties[target] = p
	return p
}

// census counts live allocations of a job by what their hosts have for a property.
type census struct {
	*property
	group  string  // whose allocations count, "" for all of the job's
	counts []int32 // by value
}

func (c *census) count(host int, by int32) {
	if v := c.of[host]; v >= 0 {
		c.counts[v] += by
	}
}

// census begins to count; tally keeps the counts up to date.
func (p *planner) census(target, group string) *census {
	for _, c := range p.censuses {
		if c.target == target && c.group == group {
			return c
		}
	}
	p.tally()
	c := &census{property: p.property(target), group: group}
	c.counts = make([]int32, len(c.values))
	have := p.onJob
	if group != "" {
		have = p.onGroup[group]
	}
	for host, n := range have {
		c.count(host, n)
	}
	p.censuses = append(p.censuses, c)
	return c
}

// distinct is a distinct_property constraint.
type distinct struct {
	target  string
	group   string // whose allocations it keeps apart, "" for all of the job's
	allowed int32  // on nodes of one value
}

func newDistinct(c *cluster.Constraint, group string) distinct {
	n, err := strconv.ParseInt(cmp.Or(c.RTarget, "1"), 10, 32)
	if err != nil {
		n = 1 // the job was checked: this is none of ours
	}
	return distinct{c.LTarget, group, max(int32(n), 1)}
}

// limit is a distinct_property constraint while nodes are looked for.
type limit struct {
	*census
	allowed int32
	refused []int32 // by value: nodes that the current look has refused
}

// full says whether a host's value is used as often as it may be.
func (l *limit) full(host int) bool {
	v := l.of[host]
	return v >= 0 && l.counts[v] >= l.allowed
}

// reasons moves what the limit has refused into counts by reason, in upstream's words.
func (l *limit) reasons(counts map[string]int) (refused int) {
	named := 0
	for v, n := range l.refused {
		if n == 0 {
			continue
		}
		reason := operandDistinctProperty
		if named++; named <= maxValuesNamed {
			reason = fmt.Sprintf("%s: %s=%s used by %d allocs", operandDistinctProperty, l.target, l.values[v], l.counts[v])
		}
		counts[reason] += int(n)
		refused += int(n)
		l.refused[v] = 0
	}
	return refused
}

// spread is a spread block while nodes are looked for.
type spread struct {
	*census
	weight int64
	share  []int64 // by value: how much of the allocations it should have, as proportions; 0 for none
	open   []bool  // by value: whether some node of it can take a placement
	score  []int64 // by value
}

// spreadsOf are the spread blocks that hold for a group: its own, and the job's for
// other attributes. Those of weight 0 hold for nothing.
func spreadsOf(job *cluster.Job, g *cluster.TaskGroup) []*cluster.Spread {
	own := func(s *cluster.Spread) bool {
		return slices.ContainsFunc(g.Spreads, func(o *cluster.Spread) bool { return o.Attribute == s.Attribute })
	}
	all := append(slices.Clone(g.Spreads), slices.DeleteFunc(slices.Clone(job.Spreads), own)...)
	return slices.DeleteFunc(all, func(s *cluster.Spread) bool { return s.Weight <= 0 })
}

// newSpread works out what share each value should have: what its target says, and
// evenly what the targets leave where it has none, among the values of nodes that can
// run the group at all.
func newSpread(s *cluster.Spread, c *census, nodes []candidate) *spread {
	sp := &spread{
		census: c, weight: int64(s.Weight),
		share: make([]int64, len(c.values)), open: make([]bool, len(c.values)), score: make([]int64, len(c.values)),
	}
	percent, left := map[string]int64{}, int64(100)
	for _, t := range s.SpreadTarget {
		percent[t.Value] = int64(t.Percent)
		left -= int64(t.Percent)
	}
	others := int64(0)
	for i := range nodes {
		v := c.of[nodes[i].host.index]
		if v < 0 || sp.share[v] > 0 {
			continue
		}
		if _, targeted := percent[c.values[v]]; !targeted && left > 0 {
			sp.share[v] = left
			others++
		}
	}
	for v, value := range c.values { // an other value's share is left/others
		if p, targeted := percent[value]; targeted {
			sp.share[v] = p * max(others, 1)
		}
	}
	return sp
}

// weigh scores the values for the next placement, of which open says that they have a
// node for it: 1000 for the one that is furthest behind its share, the others below 0,
// down to -1000 for the one that is furthest ahead and for those that should have none.
func (s *spread) weigh() {
	const unit = 1 << 30
	least, most := int64(math.MaxInt64), int64(0)
	for v, open := range s.open {
		s.score[v] = 0
		if open && s.share[v] > 0 {
			served := (int64(s.counts[v]) + 1) * unit / s.share[v] // were the placement here
			least, most, s.score[v] = min(least, served), max(most, served), served
		}
		s.open[v] = false
	}
	for v, served := range s.score {
		switch served {
		case 0:
			s.score[v] = -thousand
		case least:
			s.score[v] = thousand
		default:
			s.score[v] = -thousand * (served - least) / (most - least)
		}
	}
}

// weighted gives a host's score times the spread's weight.
func (s *spread) weighted(host int) int64 {
	score := int64(-thousand)
	if v := s.census.of[host]; v >= 0 {
		score = s.score[v]
	}
	return score * s.weight
}
