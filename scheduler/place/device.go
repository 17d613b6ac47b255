package place

import (
	"math/big"
	"sort"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// deviceAsk is one device block of a task.
type deviceAsk struct {
	task    string
	request *cluster.RequestedDevice
}

// specificFirst orders asks so that the ones fewer devices can serve choose
// first; a plain "gpu" must not take the card that another task names.
func specificFirst(asks []deviceAsk) {
	rank := func(a deviceAsk) int {
		return 2*strings.Count(a.request.Name, "/") + min(len(a.request.Constraints), 1)
	}
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

// deviceSuits says whether a device group can serve a request at all, free or not.
func deviceSuits(req *cluster.RequestedDevice, g *cluster.NodeDeviceResource, patterns patternCache) bool {
	if !deviceNamed(req.Name, g) {
		return false
	}
	for _, c := range req.Constraints {
		if !deviceHolds(c, g, patterns) {
			return false
		}
	}
	healthy := uint64(0)
	for _, d := range g.Instances {
		if d.Healthy && instanceWanted(req, d) {
			healthy++
		}
	}
	return healthy >= req.Count
}

// instanceWanted narrows a group's instances where the request names IDs:
// `${device.ids}` with set_contains_any (or any other positive operand).
func instanceWanted(req *cluster.RequestedDevice, d *cluster.NodeDevice) bool {
	for _, c := range req.Constraints {
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

// takeDevices chooses free, healthy devices of one node for all asks; each ask is
// served from one group of like devices, of several from the one that meets its
// affinities best. It fails with upstream's words.
func takeDevices(n *cluster.Node, taken map[string]string, asks []deviceAsk, patterns patternCache) (map[string][]*cluster.AllocatedDevice, string) {
	out := map[string][]*cluster.AllocatedDevice{}
	mine := map[string]bool{}
	for _, ask := range asks {
		var got *cluster.AllocatedDevice
		liked := int64(0)
		for _, g := range n.NodeResources.Devices {
			if !deviceSuits(ask.request, g, patterns) {
				continue
			}
			var ids []string
			for _, d := range g.Instances {
				if _, held := taken[d.ID]; d.Healthy && !held && !mine[d.ID] && instanceWanted(ask.request, d) {
					ids = append(ids, d.ID)
				}
				if uint64(len(ids)) == ask.request.Count {
					break
				}
			}
			if uint64(len(ids)) < ask.request.Count {
				continue
			}
			if met := deviceAffinity(ask.request, g, patterns); got == nil || met > liked {
				got, liked = &cluster.AllocatedDevice{Vendor: g.Vendor, Type: g.Type, Name: g.Name, DeviceIDs: ids}, met
			}
			if len(ask.request.Affinities) == 0 {
				break
			}
		}
		if got == nil {
			return nil, "devices: no devices match request"
		}
		for _, id := range got.DeviceIDs {
			mine[id] = true
		}
		out[ask.task] = append(out[ask.task], got)
	}
	return out, ""
}
