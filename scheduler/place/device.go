package place

import (
	"math/big"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// deviceAsk is what a task asks of one kind of device: whole ones, or a share of one.
type deviceAsk struct {
	task        string
	name        string // TYPE, VENDOR/TYPE or VENDOR/TYPE/NAME
	count       uint64 // whole devices; 1 for a share
	milli, mib  int64  // of a share; 0 for whole devices
	constraints []*cluster.Constraint
	affinities  []*cluster.Affinity
	weakest     int // link within the whole devices that it was given last
}

func (a *deviceAsk) shared() bool { return a.milli > 0 || a.mib > 0 }

// deviceAsks are those of a task. Thousandths and MiB mean the same device.
func deviceAsks(t *cluster.Task) []deviceAsk {
	if t.Resources == nil {
		return nil
	}
	var asks []deviceAsk
	share := -1
	for _, r := range t.Resources.Devices {
		name, milli, mib := r.Share()
		switch {
		case milli == 0 && mib == 0:
			asks = append(asks, deviceAsk{task: t.Name, name: name, count: r.Count, constraints: r.Constraints, affinities: r.Affinities})
			continue
		case share < 0:
			share = len(asks)
			asks = append(asks, deviceAsk{task: t.Name, name: name, count: 1})
		}
		a := &asks[share]
		a.milli, a.mib = a.milli+milli, a.mib+mib
		a.constraints = append(slices.Clip(a.constraints), r.Constraints...)
		a.affinities = append(slices.Clip(a.affinities), r.Affinities...)
		if len(name) > len(a.name) {
			a.name = name // the one that names the model
		}
	}
	return asks
}

// specificFirst orders asks so that the ones fewer devices can serve choose
// first; a plain "gpu" must not take the card that another task names.
func specificFirst(asks []deviceAsk) {
	rank := func(a deviceAsk) int { return 2*strings.Count(a.name, "/") + min(len(a.constraints), 1) }
	sort.SliceStable(asks, func(i, j int) bool { return rank(asks[i]) > rank(asks[j]) })
}

// deviceNamed says whether a request's name, TYPE, VENDOR/TYPE or
// VENDOR/TYPE/NAME, means the group.
func deviceNamed(name string, g *cluster.NodeDeviceResource) bool {
	parts := strings.SplitN(name, "/", 3)
	switch len(parts) {
	case 1:
		return g.Type == parts[0]
	case 2:
		return g.Vendor == parts[0] && g.Type == parts[1]
	}
	return g.Vendor == parts[0] && g.Type == parts[1] && g.Name == parts[2]
}

// suits says whether a group of like devices can serve the ask at all, free or not.
func (a *deviceAsk) suits(g *cluster.NodeDeviceResource, patterns patternCache) bool {
	if !deviceNamed(a.name, g) || a.mib > 0 && a.mib > g.MemoryMiB() {
		return false
	}
	for _, c := range a.constraints {
		if !deviceHolds(c, g, patterns) {
			return false
		}
	}
	healthy := uint64(0)
	for _, d := range g.Instances {
		if d.Healthy && a.wants(d) {
			healthy++
		}
	}
	return healthy >= a.count
}

// wants narrows a group's instances where the request names IDs:
// `${device.ids}` with set_contains_any (or any other positive operand).
func (a *deviceAsk) wants(d *cluster.NodeDevice) bool {
	for _, c := range a.constraints {
		if c.LTarget != "${device.ids}" {
			continue
		}
		switch c.Operand {
		case "", "=", "==", "is", "set_contains", "set_contains_all", "set_contains_any":
			if !containsAny(splitSet(c.RTarget), []string{d.ID}) {
				return false
			}
		}
	}
	return true
}

// deviceHolds judges one constraint of a request against a device group.
func deviceHolds(c *cluster.Constraint, g *cluster.NodeDeviceResource, patterns patternCache) bool {
	left, leftFound := deviceTarget(c.LTarget, g)
	right, rightFound := deviceTarget(c.RTarget, g)
	if leftFound && rightFound {
		if order, comparable := compareQuantities(left, right); comparable {
			switch c.Operand {
			case "", "=", "==", "is":
				return order == 0
			case "!=", "not":
				return order != 0
			case "<", "<=", ">", ">=":
				return ordered(c.Operand, order)
			}
		} else if left.number != nil || right.number != nil {
			switch c.Operand { // a size is never above a name, nor MiB above MHz
			case "<", "<=", ">", ">=":
				return false
			}
		}
	}
	return holds(c.Operand, left.text, right.text, leftFound, rightFound, patterns)
}

func deviceTarget(target string, g *cluster.NodeDeviceResource) (quantity, bool) {
	name, ok := interpolated(target)
	if !ok {
		return parseQuantity(target), true
	}
	switch name {
	case "device.model":
		return quantity{text: g.Name}, true
	case "device.vendor":
		return quantity{text: g.Vendor}, true
	case "device.type":
		return quantity{text: g.Type}, true
	case "device.ids":
		ids := make([]string, len(g.Instances))
		for i, d := range g.Instances {
			ids[i] = d.ID
		}
		return quantity{text: strings.Join(ids, ",")}, true
	}
	key, ok := strings.CutPrefix(name, "device.attr.")
	if !ok {
		return quantity{}, false
	}
	a, found := g.Attributes[key]
	if !found || a == nil {
		return quantity{}, false
	}
	switch {
	case a.Int != nil:
		return makeQuantity(new(big.Rat).SetInt64(*a.Int), strconv.FormatInt(*a.Int, 10), a.Unit), true
	case a.Bool != nil:
		return quantity{text: strconv.FormatBool(*a.Bool)}, true
	case a.String != nil:
		return quantity{text: *a.String}, true
	}
	return quantity{}, false
}

// quantity is a value that may be a number with a unit; number is in the base
// unit of dimension.
type quantity struct {
	text      string
	number    *big.Rat
	dimension string
}

// units are the units that Nomad's device attributes know, by name: the factor
// to the base unit and what is measured.
var units = func() map[string]quantity {
	u := map[string]quantity{"": {number: big.NewRat(1, 1)}}
	for i, prefix := range []string{"k", "M", "G", "T", "P", "E"} {
		for rate, dimension := range map[string]string{"": "bytes", "/s": "bytes per second"} {
			decimal := new(big.Int).Exp(big.NewInt(1000), big.NewInt(int64(i+1)), nil)
			binary := new(big.Int).Lsh(big.NewInt(1), uint(10*(i+1)))
			u[prefix+"B"+rate] = quantity{number: new(big.Rat).SetInt(decimal), dimension: dimension}
			u[strings.ToUpper(prefix)+"iB"+rate] = quantity{number: new(big.Rat).SetInt(binary), dimension: dimension}
		}
	}
	for name, factor := range map[string]int64{"MHz": 1e6, "GHz": 1e9} {
		u[name] = quantity{number: big.NewRat(factor, 1), dimension: "hertz"}
	}
	for name, factor := range map[string]*big.Rat{
		"mW": big.NewRat(1, 1000), "W": big.NewRat(1, 1), "kW": big.NewRat(1000, 1), "MW": big.NewRat(1e6, 1), "GW": big.NewRat(1e9, 1),
	} {
		u[name] = quantity{number: factor, dimension: "watts"}
	}
	return u
}()

func makeQuantity(n *big.Rat, text, unit string) quantity {
	u, known := units[unit]
	if !known {
		return quantity{text: strings.TrimSpace(text + " " + unit)}
	}
	return quantity{text: strings.TrimSpace(text + " " + unit), number: n.Mul(n, u.number), dimension: u.dimension}
}

// parseQuantity reads "20 GiB", "1.5GHz", "7" or any other text.
func parseQuantity(s string) quantity {
	t := strings.TrimSpace(s)
	end := 0
	for end < len(t) && strings.ContainsRune("+-0123456789.", rune(t[end])) {
		end++
	}
	n, ok := new(big.Rat).SetString(t[:end])
	unit := strings.TrimSpace(t[end:])
	if _, known := units[unit]; !ok || !known {
		return quantity{text: s}
	}
	q := makeQuantity(n, t[:end], unit)
	q.text = s
	return q
}

// compareQuantities orders two numbers of the same dimension.
func compareQuantities(a, b quantity) (order int, comparable bool) {
	if a.number == nil || b.number == nil || a.dimension != b.dimension {
		return 0, false
	}
	return a.number.Cmp(b.number), true
}

// deviceRoom is what is free of one healthy device.
type deviceRoom struct {
	id    string
	group int32 // in the node's list
	nth   int32 // of the group's instances
	whole bool  // nobody holds anything of it
	milli int64
	mib   int64

	memory int64 // MiB that it has
}

// room lists the node's healthy devices with what is free of each. It is the host's: read only.
func (h *host) room() []deviceRoom {
	if h.roomAt == h.version+1 {
		return h.rooms
	}
	out := h.rooms[:0]
	for i, g := range h.node.NodeResources.Devices {
		memory := g.MemoryMiB()
		for k, d := range g.Instances {
			if !d.Healthy {
				continue
			}
			r := deviceRoom{id: d.ID, group: int32(i), nth: int32(k), memory: memory}
			r.is(h.use.Devices[d.ID])
			out = append(out, r)
		}
	}
	h.rooms, h.roomAt = out, h.version+1
	return out
}

// is sets what is free of the device when so much of it is in use.
func (r *deviceRoom) is(use cluster.DeviceUse) {
	r.whole, r.milli, r.mib = use == cluster.DeviceUse{}, cluster.WholeMilli-use.Milli, r.memory-use.MiB
	if use.Whole > 0 {
		r.milli, r.mib = 0, 0
	}
}

// share is what the ask takes of a device of so much memory. Who names only
// thousandths gets as much of the memory; who names only memory has no claim on time.
func (a *deviceAsk) share(memory int64) (milli, mib int64) {
	if a.mib == 0 {
		return a.milli, memory * a.milli / cluster.WholeMilli
	}
	return a.milli, a.mib
}

// fits says whether one device has room for the ask, or for one of its whole devices.
func (a *deviceAsk) fits(r *deviceRoom) bool {
	if !a.shared() {
		return r.whole
	}
	milli, mib := a.share(r.memory)
	return r.milli >= milli && r.mib >= mib && (r.whole || r.milli > 0 || r.mib > 0)
}

// worth is what the ask takes of one device with so much memory, in thousandths: of its time or of its
// memory, whichever is more.
func (a *deviceAsk) worth(memory int64) int64 {
	if !a.shared() {
		return cluster.WholeMilli
	}
	milli, mib := a.share(memory)
	if memory > 0 {
		milli = max(milli, mib*cluster.WholeMilli/memory)
	}
	return milli
}

// takeDevices chooses devices for all asks out of room, and takes them from it. Each
// ask is served from one group of like devices, of several from the one that meets its
// affinities best; a share from the device that the judge finds cheapest (of equal ones the
// one that is left with least). It tells chosen, unless that is nil, each ask and what it got,
// and fails with upstream's words.
func takeDevices(n *cluster.Node, room []deviceRoom, asks []deviceAsk, patterns patternCache, j *judge, chosen func(*deviceAsk, *cluster.NodeDeviceResource, []string)) (fault string) {
	for i := range asks {
		ask := &asks[i]
		group := ask.takeShare
		if !ask.shared() {
			group = ask.takeWhole
		}
		g, ids := group(n, room, patterns, j, chosen != nil)
		if g == nil {
			return "devices: no devices match request"
		}
		if chosen != nil {
			chosen(ask, g, ids)
		}
	}
	return ""
}

func (a *deviceAsk) takeWhole(n *cluster.Node, room []deviceRoom, patterns patternCache, j *judge, named bool) (best *cluster.NodeDeviceResource, ids []string) {
	free := func(r *deviceRoom, i int, g *cluster.NodeDeviceResource) bool {
		return int(r.group) == i && r.whole && a.wantsID(g, r.id)
	}
	at, liked := 0, int64(0)
	for i, g := range n.NodeResources.Devices {
		if !a.suits(g, patterns) {
			continue
		}
		count := uint64(0)
		for k := range room {
			if free(&room[k], i, g) {
				count++
			}
		}
		if count < a.count {
			continue
		}
		if met := a.liking(g, patterns); best == nil || met > liked {
			best, at, liked = g, i, met
		}
		if len(a.affinities) == 0 {
			break
		}
	}
	if best == nil {
		return nil, nil
	}
	j.known = false
	var buf [16]int
	places := buf[:0]
	topology := linked(best)
	for k := range room {
		if free(&room[k], at, best) && (topology || uint64(len(places)) < a.count) {
			places = append(places, k)
		}
	}
	a.weakest = cluster.LinkUnknown
	if topology && a.count > 0 {
		set, rank := (&links{best, room, places}).closest(int(a.count))
		places, a.weakest = set, rank.weakest
	}
	for _, k := range places {
		r := &room[k]
		if named {
			ids = append(ids, r.id)
		}
		r.whole, r.milli, r.mib = false, 0, 0
	}
	return best, ids
}

func (a *deviceAsk) takeShare(n *cluster.Node, room []deviceRoom, patterns patternCache, j *judge, named bool) (*cluster.NodeDeviceResource, []string) {
	var best *deviceRoom
	var least, liked int64
	var tries [8]int
	for i, g := range n.NodeResources.Devices {
		if !a.suits(g, patterns) {
			continue
		}
		met := a.liking(g, patterns)
		if best != nil && met < liked {
			continue
		}
		tried := tries[:0]
		for k := range room {
			r := &room[k]
			if int(r.group) != i || !a.fits(r) || !a.wantsID(g, r.id) || slices.ContainsFunc(tried, func(k int) bool { return room[k].same(r) }) {
				continue // or as good as one before
			}
			tried = append(tried, k)
		}
		if len(tried) == 0 {
			continue
		}
		costs := j.each(room, a, tried)
		for i, k := range tried {
			r := &room[k]
			if best == nil || met > liked || costs[i] < least || costs[i] == least && (r.milli < best.milli || r.milli == best.milli && r.mib < best.mib) {
				best, least, liked = r, costs[i], met
			}
		}
	}
	if best == nil {
		return nil, nil
	}
	best.take(a)
	j.last, j.known = least, true
	var ids []string
	if named {
		ids = []string{best.id}
	}
	return n.NodeResources.Devices[best.group], ids
}

// take takes the share that is asked for.
func (r *deviceRoom) take(a *deviceAsk) {
	milli, mib := a.share(r.memory)
	r.whole, r.milli, r.mib = false, r.milli-milli, r.mib-mib
}

// same says whether it makes no difference which of the two is taken.
func (r *deviceRoom) same(o *deviceRoom) bool {
	return r.group == o.group && r.whole == o.whole && r.milli == o.milli && r.mib == o.mib
}

func (a *deviceAsk) wantsID(g *cluster.NodeDeviceResource, id string) bool {
	return len(a.constraints) == 0 || slices.ContainsFunc(g.Instances, func(d *cluster.NodeDevice) bool { return d.ID == id && a.wants(d) })
}
