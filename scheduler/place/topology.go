package place

import "github.com/rxvision/rxvision/cluster"

// exactDevices bounds the free devices of which all sets are looked at: 70 at most.
// Among more of them each grows one set.
const exactDevices = 8

// linked says whether the devices of a group tell how they reach each other.
func linked(g *cluster.NodeDeviceResource) bool {
	return len(g.Instances) > 1 && len(g.Instances[0].Links) > 0
}

// links ranks sets of devices of one group.
type links struct {
	group *cluster.NodeDeviceResource
	room  []deviceRoom
	free  []int // places in room, in order
}

// setRank says how good a set is to be given to one task: first by the weakest link within
// it, then by all of them, then by how little it is linked to what stays free, so that sets
// which belong together stay whole for others.
type setRank struct{ weakest, sum, cut int }

func (a setRank) better(b setRank) bool {
	switch {
	case a.weakest != b.weakest:
		return a.weakest > b.weakest
	case a.sum != b.sum:
		return a.sum > b.sum
	}
	return a.cut < b.cut
}

// level is the link between two places of room; the weaker one where the ends differ.
func (l *links) level(a, b int) int {
	i, j := int(l.room[a].nth), int(l.room[b].nth)
	one := func(i, j int) int {
		if to := l.group.Instances[i].Links; j < len(to) {
			return to[j]
		}
		return cluster.LinkUnknown
	}
	return min(one(i, j), one(j, i))
}

// rank judges a set, which is in order as free is.
func (l *links) rank(set []int) setRank {
	r := setRank{weakest: cluster.LinkMost}
	for k, a := range set {
		for _, b := range set[k+1:] {
			level := l.level(a, b)
			r.weakest, r.sum = min(r.weakest, level), r.sum+level
		}
	}
	for _, f := range l.free {
		inside := false
		for _, a := range set {
			inside = inside || a == f
		}
		for _, a := range set {
			if !inside {
				r.cut += l.level(a, f)
			}
		}
	}
	return r
}

// closest chooses so many of the free devices as are best linked; the first of equals.
func (l *links) closest(count int) (best []int, rank setRank) {
	consider := func(set []int) {
		if r := l.rank(set); best == nil || r.better(rank) {
			best, rank = append(best[:0], set...), r
		}
	}
	if len(l.free) <= exactDevices {
		set := make([]int, 0, count)
		var choose func(from int)
		choose = func(from int) {
			if len(set) == count {
				consider(set)
				return
			}
			for i := from; i <= len(l.free)-(count-len(set)); i++ {
				set = append(set, l.free[i])
				choose(i + 1)
				set = set[:len(set)-1]
			}
		}
		choose(0)
		return best, rank
	}
	for _, seed := range l.free {
		consider(l.grow(seed, count))
	}
	return best, rank
}

// grow makes a set of a device and, one after the other, those that are best linked to it.
func (l *links) grow(seed, count int) []int {
	set, in := []int{seed}, map[int]bool{seed: true}
	for len(set) < count {
		next, best := -1, setRank{}
		for _, f := range l.free {
			if in[f] {
				continue
			}
			r := setRank{weakest: cluster.LinkMost}
			for _, a := range set {
				level := l.level(a, f)
				r.weakest, r.sum = min(r.weakest, level), r.sum+level
			}
			if next < 0 || r.better(best) {
				next, best = f, r
			}
		}
		set, in[next] = append(set, next), true
	}
	return set
}

// linkScores are the scores of a node by the weakest link within what it would give.
var linkScores = [...]int64{
	cluster.LinkUnknown: 0, cluster.LinkSystem: 100, cluster.LinkNUMA: 250, cluster.LinkHostBridge: 400,
	cluster.LinkSwitches: 500, cluster.LinkSwitch: 650, cluster.LinkBoard: 800, cluster.LinkNVLink: thousand,
}

func linkScore(level int) int64 { return linkScores[min(max(level, 0), len(linkScores)-1)] }

// wantsLinks says whether the demand asks for several whole devices for one task.
func (d *demand) wantsLinks() bool {
	for i := range d.devices {
		if a := &d.devices[i]; !a.shared() && a.count > 1 {
			return true
		}
	}
	return false
}

// common is the weakest link within what each of the asks was given last.
func (d *demand) common() int {
	level := cluster.LinkMost
	for i := range d.devices {
		if a := &d.devices[i]; !a.shared() && a.count > 1 {
			level = min(level, a.weakest)
		}
	}
	return level
}

// anyLinked says whether some node tells how its devices reach each other.
func anyLinked(list []candidate) bool {
	for i := range list {
		for _, g := range list[i].host.node.NodeResources.Devices {
			if linked(g) {
				return true
			}
		}
	}
	return false
}
