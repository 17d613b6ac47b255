package jobspec

import (
	"cmp"
	"strings"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// MaxSpreads bounds the spread blocks, and the distinct_property constraints, of a
// job or a group: each of them costs at every placement.
const MaxSpreads = 16

const (
	defaultWeight = 50
	maxWeight     = 100
)

// affinities checks the affinity blocks of a job, group, task or device.
func (c *checker) affinities(in []*api.Affinity, path string, at level) []*cluster.Affinity {
	var out []*cluster.Affinity
	list := present(in)
	for i, a := range list {
		block := element(join(path, "affinity"), i, len(list))
		k := &cluster.Constraint{LTarget: a.LTarget, RTarget: a.RTarget, Operand: cmp.Or(a.Operand, "=")}
		c.target(k.LTarget, join(block, "attribute"), at)
		if distinct(k.Operand) {
			c.fault(join(block, "operator"), "%s belongs in a constraint, not in an affinity", k.Operand)
		} else {
			c.comparison(k, block, comparisons)
		}
		weight := int(or(a.Weight, defaultWeight))
		if weight == 0 || weight < -maxWeight || weight > maxWeight {
			c.fault(join(block, "weight"), "is %d; it must be between -%d and %d, and not 0", weight, maxWeight, maxWeight)
		}
		out = append(out, &cluster.Affinity{LTarget: k.LTarget, RTarget: k.RTarget, Operand: k.Operand, Weight: weight})
	}
	return out
}

// spreads checks the spread blocks of a job or a group.
func (c *checker) spreads(in []*api.Spread, path string) []*cluster.Spread {
	var out []*cluster.Spread
	list := present(in)
	if len(list) > MaxSpreads {
		c.fault(element(join(path, "spread"), MaxSpreads, len(list)), "there are %d spread blocks; at most %d are allowed", len(list), MaxSpreads)
		return nil
	}
	seen := map[string]bool{}
	for i, s := range list {
		block := element(join(path, "spread"), i, len(list))
		spread := &cluster.Spread{Attribute: s.Attribute, Weight: int(or(s.Weight, defaultWeight)), SpreadTarget: c.spreadTargets(s.SpreadTarget, block)}
		c.property(s.Attribute, block, "to spread over")
		if seen[s.Attribute] && s.Attribute != "" {
			c.fault(join(block, "attribute"), "another spread block has %s already", quote(s.Attribute))
		}
		seen[s.Attribute] = true
		switch {
		case spread.Weight < 0 || spread.Weight > maxWeight:
			c.fault(join(block, "weight"), "is %d; it must be between 0 and %d", spread.Weight, maxWeight)
		case spread.Weight == 0:
			c.warn(join(block, "weight"), "is 0: the block changes nothing")
		}
		out = append(out, spread)
	}
	return out
}

func (c *checker) spreadTargets(in []*api.SpreadTarget, path string) []*cluster.SpreadTarget {
	var out []*cluster.SpreadTarget
	sum := 0
	seen := map[string]bool{}
	for _, t := range present(in) {
		target := join(path, join("target", t.Value))
		switch {
		case t.Value == "":
			c.fault(target, "has no value")
		case seen[t.Value]:
			c.fault(target, "is there twice; the values of a spread's targets must differ")
		}
		seen[t.Value] = true
		if t.Percent > 100 {
			c.fault(join(target, "percent"), "is %d; it must be between 0 and 100", t.Percent)
		}
		sum += int(t.Percent)
		out = append(out, &cluster.SpreadTarget{Value: t.Value, Percent: int(t.Percent)})
	}
	if sum > 100 {
		c.fault(path, "the percentages of its targets add up to %d; at most 100 is there to share", sum)
	}
	return out
}

// property checks an attribute by whose values allocations are counted.
func (c *checker) property(target, path, use string) {
	switch {
	case target == "":
		c.fault(path, "has no attribute %s", use)
	case !strings.HasPrefix(target, "${"):
		c.fault(join(path, "attribute"), "%s is no attribute of a node; write for example ${meta.rack}", quote(target))
	default:
		c.target(target, join(path, "attribute"), levelGroup)
	}
}
