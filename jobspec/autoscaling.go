package jobspec

import (
	"maps"
	"math"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/cron"
)

// sourceOwn is the source of metrics that the servers' own autoscaler reads. Policies whose checks name others are
// for other autoscalers, and stored as they are.
const sourceOwn = "rxvision"

// Defaults of scaling policies.
const (
	DefaultScalingCooldown = 30 * time.Second
	DefaultScalingWindow   = 5 * time.Minute
	defaultQueryWindow     = time.Minute
	maxQueryWindow         = 10 * time.Minute
	maxScalingWindow       = time.Hour
	maxScalingChecks       = 16
	defaultTolerance       = 0.1
)

var (
	policyKeys   = []string{"check", "cooldown", "cooldown_on_scale_up", "evaluation_interval", "stabilization_window"}
	checkKeys    = []string{"query", "query_window", "schedule", "source", "strategy"}
	targetKeys   = []string{"max_scale_down", "max_scale_up", "target", "threshold"}
	scheduleKeys = []string{"duration", "start", "time_zone"}
)

// autoscaling reads a policy that is for the servers' own autoscaler (Nomad: Autoscaler, policy,
// https://developer.hashicorp.com/nomad/tools/autoscaling/policy).
func (c *checker) autoscaling(p *cluster.ScalingPolicy, in map[string]any, path string) {
	checks := blocksOf(in["check"])
	own := 0
	for _, b := range checks {
		if src, _ := b.body["source"].(string); src == sourceOwn || b.body["schedule"] != nil && src == "" {
			own++
		}
	}
	if own == 0 {
		if len(checks) > 0 && p.Enabled {
			hint := ""
			for _, b := range checks {
				if src, _ := b.body["source"].(string); hint == "" && src != "" {
					hint = didYouMean(src, []string{sourceOwn})
				}
			}
			c.warn(join(path, "check"), "none has the source %s: the policy is kept for another autoscaler, and the servers scale nothing by it%s", quote(sourceOwn), hint)
		}
		return
	}
	c.keysOf(in, policyKeys, path)
	p.Cooldown = c.durationIn(in, "cooldown", path, DefaultScalingCooldown, maxScalingWindow)
	p.CooldownUp = c.durationIn(in, "cooldown_on_scale_up", path, 0, maxScalingWindow)
	p.Window = c.durationIn(in, "stabilization_window", path, DefaultScalingWindow, maxScalingWindow)
	c.durationIn(in, "evaluation_interval", path, 0, maxScalingWindow) // everything is looked at every few seconds
	if len(checks) > maxScalingChecks {
		c.fault(path, "has %d checks; at most %d are allowed", len(checks), maxScalingChecks)
		return
	}
	for _, b := range checks {
		at := join(path, "check."+b.label)
		if src, _ := b.body["source"].(string); src != sourceOwn && b.body["schedule"] == nil {
			c.fault(join(at, "source"), "is %s, but another check's is %s: one autoscaler decides about a group", quote(src), quote(sourceOwn))
			continue
		}
		c.keysOf(b.body, checkKeys, at)
		check := &cluster.ScalingCheck{Name: b.label}
		p.Checks = append(p.Checks, check)
		strategies := blocksOf(b.body["strategy"])
		if len(strategies) != 1 {
			c.fault(join(at, "strategy"), "a check has one strategy: target-value or, with a schedule, fixed-value")
			continue
		}
		s := strategies[0]
		under := join(at, "strategy."+s.label)
		if b.body["schedule"] != nil {
			c.scheduled(check, b.body, s, at, under)
			continue
		}
		c.targeted(check, b.body, s, at, under)
	}
}

// measurable warns of metrics that cannot be had of the group, and of a group that nothing would wake.
func (c *checker) measurable(g *cluster.TaskGroup, path string) {
	p := g.Scaling
	if p == nil || !p.Enabled || len(p.Checks) == 0 {
		return
	}
	serves := slices.ContainsFunc(g.Tasks, func(t *cluster.Task) bool { return t.Model != nil })
	devices, shared := false, false
	for _, t := range g.Tasks {
		if t.Resources == nil {
			continue
		}
		for _, d := range t.Resources.Devices {
			_, milli, mib := d.Share()
			devices, shared = true, shared || milli > 0 || mib > 0
		}
	}
	wakes := serves
	for _, k := range p.Checks {
		at := join(path, "policy.check."+k.Name+".query")
		switch k.Query {
		case "":
			wakes = true
		case cluster.MetricGPU, cluster.MetricGPUMemory:
			if !devices {
				c.warn(at, "no task asks for a GPU: %s will be missing, and nothing be scaled down", quote(k.Query))
			} else if shared {
				c.warn(at, "is that of the whole GPU, whoever shares it")
			}
		case cluster.MetricInFlight, cluster.MetricQueueTime, cluster.MetricHeld:
			if !serves {
				c.warn(at, "no task serves a model: %s will be missing, and nothing be scaled down", quote(k.Query))
			}
		}
	}
	if p.Min == 0 && !wakes {
		c.warn(join(path, "min"), "is 0, but the group serves no model whose requests would wake it, and has no schedule: once at 0 it stays there until it is scaled by hand")
	}
}

func (c *checker) targeted(check *cluster.ScalingCheck, body map[string]any, s policyBlock, at, under string) {
	check.Query, _ = body["query"].(string)
	c.oneOf(check.Query, join(at, "query"), cluster.ScalingQueries...)
	check.Window = c.durationIn(body, "query_window", at, defaultQueryWindow, maxQueryWindow)
	c.oneOf(s.label, join(at, "strategy"), "target-value")
	c.keysOf(s.body, targetKeys, under)
	target := c.numberIn(s.body, "target", under, 0)
	if target <= 0 {
		c.fault(join(under, "target"), "must be more than 0: it is the metric that each allocation is to have")
	}
	check.Target = int64(math.Round(target * 1000))
	check.Tolerance = int64(math.Round(c.numberIn(s.body, "threshold", under, defaultTolerance) * 1000))
	check.MaxUp, check.MaxDown = int(c.numberIn(s.body, "max_scale_up", under, 0)), int(c.numberIn(s.body, "max_scale_down", under, 0))
	if check.Tolerance < 0 || check.MaxUp < 0 || check.MaxDown < 0 {
		c.fault(under, "threshold, max_scale_up and max_scale_down must not be negative")
	}
}

func (c *checker) scheduled(check *cluster.ScalingCheck, body map[string]any, s policyBlock, at, under string) {
	schedules := blocksOf(body["schedule"])
	on := join(at, "schedule")
	if len(schedules) != 1 || schedules[0].label != "" {
		c.fault(on, "is one block without a label")
		return
	}
	times := schedules[0].body
	c.oneOf(s.label, join(at, "strategy"), "fixed-value")
	c.keysOf(s.body, []string{"value"}, under)
	c.keysOf(times, scheduleKeys, on)
	check.Count = int(c.numberIn(s.body, "value", under, 0))
	if check.Count < 1 || check.Count > MaxCount {
		c.fault(join(under, "value"), "must be from 1 to %d: the count while the schedule runs", MaxCount)
	}
	check.Start, _ = times["start"].(string)
	check.TimeZone, _ = times["time_zone"].(string)
	if _, err := cron.Parse(check.TimeZone, check.Start); err != nil {
		c.fault(join(on, "start"), "%v", err)
	}
	check.Duration = c.durationIn(times, "duration", on, 0, 31*24*time.Hour)
	if check.Duration <= 0 {
		c.fault(join(on, "duration"), "is missing: how long the count holds")
	}
}

// keysOf reports what a block has beyond the keys that it may have.
func (c *checker) keysOf(body map[string]any, allowed []string, path string) {
	for _, k := range slices.Sorted(maps.Keys(body)) {
		if !slices.Contains(allowed, k) {
			c.fault(join(path, k), "unknown key %s%s%s", quote(k), didYouMean(k, allowed), known(allowed))
		}
	}
}

func (c *checker) durationIn(body map[string]any, key, path string, without, most time.Duration) time.Duration {
	v, has := body[key]
	if !has {
		return without
	}
	text, _ := v.(string)
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > most {
		c.fault(join(path, key), "is %v; it must be a duration such as 30s, of at most %v", v, most)
		return without
	}
	return d
}

func (c *checker) numberIn(body map[string]any, key, path string, without float64) float64 {
	v, has := body[key]
	if !has {
		return without
	}
	switch n := v.(type) {
	case int:
		return float64(n)
	case int64:
		return float64(n)
	case float64:
		if !math.IsNaN(n) && math.Abs(n) < 1e12 {
			return n
		}
	}
	c.fault(join(path, key), "is %v; it must be a number", v)
	return without
}

// policyBlock is a block of a policy with its label, "" for none.
type policyBlock struct {
	label string
	body  map[string]any
}

// blocksOf gives the blocks of one name: HCL makes lists of maps of them, with a map for each label, and JSON the same or plain maps.
func blocksOf(v any) (all []policyBlock) {
	for _, m := range mapsOf(v) {
		nested := len(m) > 0
		for _, inner := range m {
			nested = nested && mapsOf(inner) != nil
		}
		if !nested {
			all = append(all, policyBlock{"", m})
			continue
		}
		for _, label := range slices.Sorted(maps.Keys(m)) {
			for _, body := range mapsOf(m[label]) {
				all = append(all, policyBlock{label, body})
			}
		}
	}
	return all
}

// mapsOf gives a map, or a list of maps, as a list; nil when it is something else.
func mapsOf(v any) []map[string]any {
	switch v := v.(type) {
	case map[string]any:
		return []map[string]any{v}
	case []map[string]any:
		return v
	case []any:
		var out []map[string]any
		for _, x := range v {
			m, is := x.(map[string]any)
			if !is {
				return nil
			}
			out = append(out, m)
		}
		return out
	}
	return nil
}
