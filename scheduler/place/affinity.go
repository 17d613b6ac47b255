package place

import (
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// preference adds up affinities: the weights of those that hold, and those that all
// of them could have, whatever their sign.
type preference struct{ met, of int64 }

func (p *preference) add(a *cluster.Affinity, holds bool) {
	w := int64(a.Weight)
	if holds {
		p.met += w
	}
	p.of += max(w, -w)
}

// score is the share that is met, in thousandths: -1000 to 1000.
func (p preference) score() int64 {
	if p.of == 0 {
		return 0
	}
	return p.met * thousand / p.of
}

// affinity scores a node by the affinities of job, group and tasks.
func (d *demand) affinity(n *cluster.Node) int64 {
	var p preference
	at := nodeLookup(n)
	for _, a := range d.affinities {
		left, leftFound := at(a.LTarget)
		right, rightFound := at(a.RTarget)
		p.add(a, holds(a.Operand, left, right, leftFound, rightFound, d.patterns))
	}
	return p.score()
}

// prefersDevices says whether some device has affinities.
func (d *demand) prefersDevices() bool {
	return slices.ContainsFunc(d.devices, func(a deviceAsk) bool { return len(a.affinities) > 0 })
}

// deviceAffinity scores a host by the devices that it would give.
func (d *demand) deviceAffinity(h *host) int64 {
	var p preference
	d.room, d.judge.mix = append(d.room[:0], h.room()...), nil
	takeDevices(h.node, d.room, d.devices, d.patterns, &d.judge, func(ask *deviceAsk, g *cluster.NodeDeviceResource, _ []string) {
		p.addDevice(ask, g, d.patterns)
	})
	return p.score()
}

// addDevice adds up the affinities of one ask for a device group.
func (p *preference) addDevice(ask *deviceAsk, g *cluster.NodeDeviceResource, patterns patternCache) {
	for _, a := range ask.affinities {
		p.add(a, deviceHolds(&cluster.Constraint{LTarget: a.LTarget, RTarget: a.RTarget, Operand: a.Operand}, g, patterns))
	}
}

// liking scores a device group by the affinities of one ask.
func (a *deviceAsk) liking(g *cluster.NodeDeviceResource, patterns patternCache) int64 {
	if len(a.affinities) == 0 {
		return 0
	}
	var p preference
	p.addDevice(a, g, patterns)
	return p.score()
}
