package jobspec

import (
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// maxTopology bounds the levels that rx_topology names.
const maxTopology = 8

// topologyNode is what rx_topology calls a single node.
const topologyNode = "node"

// A signal's name; agents know which ones there are.
var signalName = regexp.MustCompile(`^SIG[A-Z0-9]{2,10}$`)

// gang reads what the group's meta says of a gang; nil when it is none.
func (c *checker) gang(job *cluster.Job, g *cluster.TaskGroup, path string) *cluster.Gang {
	is, _ := c.flag(g.Meta, "rx_gang", path)
	required, _ := c.flag(g.Meta, "rx_topology_required", path)
	topology, has := g.Meta["rx_topology"]
	if !is {
		for _, key := range []string{"rx_topology", "rx_topology_required"} {
			if _, has := g.Meta[key]; has {
				c.fault(join(path, key), "means nothing without rx_gang = \"true\"")
			}
		}
		return nil
	}
	gang := &cluster.Gang{Required: required}
	if has {
		gang.Topology = c.topology(topology, join(path, "rx_topology"))
	} else if required {
		c.fault(join(path, "rx_topology_required"), "needs rx_topology, which says what the members are to share")
	}
	if g.Count > cluster.MaxGang {
		c.fault(join(path, "rx_gang"), "the group has %d allocations; a gang has at most %d", g.Count, cluster.MaxGang)
	}
	if g.Disconnect != nil {
		c.fault(join(path, "rx_gang"), "a gang has no disconnect block: when a node is lost its members all start anew")
	}
	if g.Update != nil && g.Update.Canary > 0 {
		c.fault(join(path, "rx_gang"), "a gang has no canaries: its members are replaced together")
	}
	if job.AllAtOnce {
		c.fault(join(path, "rx_gang"), "a job with a gang has no all_at_once: the gang is placed whole as it is")
	}
	return gang
}

// topology reads a list of attributes of nodes.
func (c *checker) topology(list, path string) (out []string) {
	parts := strings.Split(list, ",")
	if len(parts) > maxTopology {
		c.fault(path, "names %d levels; at most %d are allowed", len(parts), maxTopology)
		return nil
	}
	for _, part := range parts {
		part = strings.TrimSpace(part)
		name, closed := strings.CutSuffix(strings.TrimPrefix(part, "${"), "}")
		switch {
		case part == topologyNode:
			out = append(out, "${node.unique.id}")
		case strings.HasPrefix(part, "${") && closed && isTarget(name):
			out = append(out, part)
		default:
			c.fault(path, "%s is no attribute of nodes: write node, or one such as ${meta.rack}", quote(part))
		}
	}
	return out
}

// isTarget says whether a name is one that constraints of nodes may refer to.
func isTarget(name string) bool {
	for _, t := range targets {
		if name == t || strings.HasSuffix(t, ".") && strings.HasPrefix(name, t) && len(name) > len(t) {
			return true
		}
	}
	return false
}

// preempt reads what the group's meta says of its preemption; nil for nothing.
func (c *checker) preempt(meta map[string]string, path string) *cluster.PreemptPolicy {
	var p cluster.PreemptPolicy
	if is, set := c.flag(meta, "rx_preemptible", path); set {
		p.Never, p.Reclaim = !is, is
	}
	p.Move, _ = c.flag(meta, "rx_movable", path)
	if p.Move && p.Never {
		c.fault(join(path, "rx_movable"), "contradicts rx_preemptible = \"false\": what may not be preempted is not moved either")
	}
	p.MinRuntime = c.span(meta, "rx_min_runtime", path, 0)
	p.Grace = c.span(meta, "rx_preempt_grace", path, cluster.MaxPreemptGrace)
	if s, has := meta["rx_preempt_signal"]; has {
		if !signalName.MatchString(s) {
			c.fault(join(path, "rx_preempt_signal"), "%s is no name of a signal, such as SIGUSR1", quote(s))
		}
		p.Signal = s
	}
	if p == (cluster.PreemptPolicy{}) {
		return nil
	}
	return &p
}

// flag reads a meta key that is true or false.
func (c *checker) flag(meta map[string]string, key, path string) (is, set bool) {
	v, set := meta[key]
	if !set {
		return false, false
	}
	is, err := strconv.ParseBool(v)
	if err != nil {
		c.fault(join(path, key), "is %s; it must be true or false", quote(v))
	}
	return is, err == nil
}

// span reads a meta key that is a duration, of at most most unless that is 0.
func (c *checker) span(meta map[string]string, key, path string, most time.Duration) time.Duration {
	v, has := meta[key]
	if !has {
		return 0
	}
	d, err := time.ParseDuration(v)
	switch {
	case err != nil:
		c.fault(join(path, key), "%s is no duration, such as 30s or 5m", quote(v))
	case d <= 0:
		c.fault(join(path, key), "is %v; it must be more than nothing", d)
	case most > 0 && d > most:
		c.fault(join(path, key), "is %v; at most %v are allowed", d, most)
	default:
		return d
	}
	return 0
}
