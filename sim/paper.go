package sim

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// paper places as the policies of Weng et al. do in the simulator that they published
// (https://github.com/hkust-adsl/kubernetes-scheduler-simulator): scores are whole numbers from 0 to 100, and
// of equal nodes the first is taken in an order that is drawn once. Only what all of them check, whether a pod
// fits, looks at memory.
type paper struct {
	score  func(n *paperNode, pod *TracePod) paperScore
	rnd    *rand.Rand
	any    bool // equal nodes and GPUs are drawn from, each time anew
	nodes  []*paperNode
	kinds  paperKinds
	judged map[*paperKind][]paperScore // by node
}

type paperNode struct {
	model       string
	cpu, memory int64
	gpus        []int64 // free thousandths
	version     int
}

// paperKind is what pods with equal scores have in common.
type paperKind struct {
	cpu, gpus, milli int64
	models           []string
	name             string  // of its models
	part             float64 // of all pods
}

// paperKinds are kinds of pods by what they ask for.
type paperKinds map[string]*paperKind

func (k paperKinds) of(p *TracePod) *paperKind {
	name := strings.Join(p.Models, "|")
	key := fmt.Sprint(p.CPU, p.GPUs, p.Milli, name)
	if k[key] == nil {
		k[key] = &paperKind{cpu: p.CPU, gpus: p.GPUs, milli: p.Milli, models: p.Models, name: name}
	}
	return k[key]
}

// paperScore is what a node is worth to a pod, and the GPU of it that a share would get.
type paperScore struct{ version, points, gpu int }

// The largest node, by which the peers normalise.
const (
	paperMostCPU = 128_000
	paperMostGPU = 8 * cluster.WholeMilli
)

func newPaper(t *Trace, policy string, seed uint64) *paper {
	p := &paper{rnd: rand.New(rand.NewPCG(seed, 0x9ee5)), kinds: paperKinds{}, judged: map[*paperKind][]paperScore{}}
	for _, n := range t.Nodes {
		node := &paperNode{model: n.Model, cpu: n.CPU, memory: n.Memory, gpus: make([]int64, n.GPUs), version: 1}
		for i := range node.gpus {
			node.gpus[i] = cluster.WholeMilli
		}
		p.nodes = append(p.nodes, node)
	}
	p.rnd.Shuffle(len(p.nodes), func(i, j int) { p.nodes[i], p.nodes[j] = p.nodes[j], p.nodes[i] })
	points := func(f float64) int { return int(f * 100) }
	switch policy {
	case "random":
		p.any = true
		p.score = func(n *paperNode, pod *TracePod) paperScore { return paperScore{} }
	case "bestfit": // the least that would be left
		p.score = func(n *paperNode, pod *TracePod) paperScore {
			left := float64(n.cpu-pod.CPU)/paperMostCPU + float64(n.free()-pod.Demand())/paperMostGPU
			return paperScore{points: points(1 - left/2), gpu: n.fullest(pod.Milli)}
		}
	case "dotprod": // the least of what is free, each by how much of it is asked for
		p.score = func(n *paperNode, pod *TracePod) paperScore {
			product := float64(n.cpu)/paperMostCPU*float64(pod.CPU)/paperMostCPU + float64(n.free())/paperMostGPU*float64(pod.Demand())/paperMostGPU
			return paperScore{points: points(1 - product/2), gpu: n.fullest(pod.Milli)}
		}
	case "paperfgd": // the least growth of fragmentation
		typical := typicalPods(t)
		p.score = func(n *paperNode, pod *TracePod) paperScore {
			before := typical.fragmentation(n)
			judge := func(gpu int) paperScore {
				after := paperNode{model: n.model, cpu: n.cpu - pod.CPU, gpus: slices.Clone(n.gpus)}
				after.take(pod, gpu)
				growth := typical.fragmentation(&after) - before
				return paperScore{points: points(1 / (1 + math.Exp(growth/cluster.WholeMilli))), gpu: gpu}
			}
			if pod.Milli == 0 || pod.Milli == cluster.WholeMilli {
				return judge(0)
			}
			best := paperScore{points: -1}
			for i, g := range n.gpus {
				if g >= pod.Milli {
					if s := judge(i); s.points > best.points {
						best = s
					}
				}
			}
			return best
		}
	}
	return p
}

func (p *paper) place(pod *TracePod) bool {
	kind := p.kinds.of(pod)
	scores := p.judged[kind]
	if scores == nil {
		scores = make([]paperScore, len(p.nodes))
		p.judged[kind] = scores
	}
	best, ties := -1, 0
	for i, n := range p.nodes {
		if n.memory < pod.Memory || !n.fits(kind) {
			continue
		}
		if scores[i].version != n.version {
			scores[i] = p.score(n, pod)
			scores[i].version = n.version
		}
		switch {
		case best < 0 || scores[i].points > scores[best].points:
			best, ties = i, 1
		case p.any:
			if ties++; p.rnd.IntN(ties) == 0 {
				best = i
			}
		}
	}
	if best < 0 {
		return false
	}
	n, gpu := p.nodes[best], scores[best].gpu
	if p.any && pod.Milli > 0 && pod.Milli < cluster.WholeMilli {
		ties = 0
		for i, g := range n.gpus {
			if g >= pod.Milli {
				if ties++; p.rnd.IntN(ties) == 0 {
					gpu = i
				}
			}
		}
	}
	n.cpu, n.memory, n.version = n.cpu-pod.CPU, n.memory-pod.Memory, n.version+1
	n.take(pod, gpu)
	return true
}

func (n *paperNode) free() (milli int64) {
	for _, g := range n.gpus {
		milli += g
	}
	return milli
}

// fullest is the GPU with room for so much that is left with the least.
func (n *paperNode) fullest(milli int64) int {
	best := -1
	for i, g := range n.gpus {
		if g >= milli && (best < 0 || g < n.gpus[best]) {
			best = i
		}
	}
	return best
}

// fits says whether the node has the processors that the kind asks for, and of one of its models the GPUs.
func (n *paperNode) fits(k *paperKind) bool {
	if n.cpu < k.cpu {
		return false
	}
	if k.gpus == 0 {
		return true
	}
	if len(k.models) > 0 && !slices.Contains(k.models, n.model) {
		return false
	}
	have := int64(0)
	for _, g := range n.gpus {
		if g >= k.milli {
			have++
		}
	}
	return have >= k.gpus
}

// take takes a share of one GPU, or the first that are whole.
func (n *paperNode) take(pod *TracePod, gpu int) {
	if pod.GPUs > 0 && pod.Milli < cluster.WholeMilli {
		n.gpus[gpu] -= pod.Milli
		return
	}
	left := pod.GPUs
	for i := range n.gpus {
		if left > 0 && n.gpus[i] == cluster.WholeMilli {
			n.gpus[i], left = 0, left-1
		}
	}
}

// typical are the commonest kinds of pods, and what part each is of them.
type typical []*paperKind

// typicalPods are the kinds that come to 95 % of a trace's pods, those without GPUs among them.
func typicalPods(t *Trace) typical {
	byKey := paperKinds{}
	for i := range t.Pods {
		byKey.of(&t.Pods[i]).part++
	}
	kinds := slices.SortedFunc(maps.Values(byKey), func(a, b *paperKind) int {
		return cmp.Or(cmp.Compare(b.part, a.part), cmp.Compare(b.cpu, a.cpu), cmp.Compare(b.milli, a.milli), cmp.Compare(b.gpus, a.gpus), cmp.Compare(b.name, a.name))
	})
	covered, n := 0.0, 0
	for ; covered < 0.95*float64(len(t.Pods)); n++ {
		covered += kinds[n].part
	}
	for _, k := range kinds[:n] {
		k.part /= covered
	}
	return kinds[:n]
}

// fragmentation is what a typical pod cannot use of a node's free GPUs: all, if it does not fit there or needs none,
// else those with less left than it asks of each.
func (t typical) fragmentation(n *paperNode) float64 {
	free, sum := float64(n.free()), 0.0
	for _, k := range t {
		if k.gpus == 0 || !n.fits(k) {
			sum += k.part * free
			continue
		}
		for _, g := range n.gpus {
			if g < k.milli {
				sum += k.part * float64(g)
			}
		}
	}
	return sum
}
