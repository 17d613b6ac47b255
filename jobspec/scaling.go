package jobspec

import (
	"encoding/json"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// MaxScalingPolicy bounds the bytes of what a scaling block holds for the autoscaler, as JSON.
const MaxScalingPolicy = 64 << 10

// scaling checks a group's scaling block against its count. What is in policy is for the autoscaler to understand.
func (c *checker) scaling(in *api.ScalingPolicy, count int, path string) *cluster.ScalingPolicy {
	if in == nil {
		return nil
	}
	p := &cluster.ScalingPolicy{Type: in.Type, Min: or(in.Min, int64(count)), Max: or(in.Max, 0), Enabled: or(in.Enabled, true)}
	if p.Type == "" {
		p.Type = cluster.ScalingHorizontal
	}
	c.oneOf(p.Type, join(path, "type"), cluster.ScalingHorizontal)
	switch {
	case in.Max == nil:
		c.fault(join(path, "max"), "is missing: say how far the count may grow")
	case p.Max > MaxCount:
		c.fault(join(path, "max"), "is %d; at most %d are allowed", p.Max, MaxCount)
	case p.Min < 0:
		c.fault(join(path, "min"), "must not be negative")
	case p.Max < p.Min:
		c.fault(join(path, "max"), "is %d; it must not be less than min, which is %d", p.Max, p.Min)
	case int64(count) < p.Min || int64(count) > p.Max:
		c.fault(path, "allows %d to %d, but the group's count is %d", p.Min, p.Max, count)
	}
	if len(in.Policy) > 0 {
		raw, err := json.Marshal(in.Policy)
		switch {
		case err != nil:
			c.fault(join(path, "policy"), "cannot be written as JSON: %v", err)
		case len(raw) > MaxScalingPolicy:
			c.fault(join(path, "policy"), "has %d bytes; at most %d are allowed", len(raw), MaxScalingPolicy)
		}
		p.Policy = raw
		c.autoscaling(p, in.Policy, join(path, "policy"))
	}
	return p
}
