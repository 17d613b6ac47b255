package main

import (
	"bytes"
	"fmt"
	"math"
	"slices"

	"github.com/rxvision/rxvision/sim"
)

// The plot of a day: three panels, one above the other, in SVG.
const (
	plotWidth, plotLeft, plotRight = 960.0, 70.0, 20.0
	panelHeight, panelGap          = 210.0, 70.0
	plotTop                        = 60.0
)

var classColours = []string{"#2b6cb0", "#dd8f2d", "#7fb69a"}

const peerColour = "#9b2c2c"

// panel is one set of axes.
type panel struct {
	out             *bytes.Buffer
	top, xmax, ymax float64
	log             bool // of x, from 1
	title, xl       string
}

func (p *panel) x(v float64) float64 {
	w := plotWidth - plotLeft - plotRight
	if p.log {
		return plotLeft + w*math.Log10(max(v, 1))/math.Log10(p.xmax)
	}
	return plotLeft + w*v/p.xmax
}

func (p *panel) y(v float64) float64 { return p.top + panelHeight*(1-v/p.ymax) }

func (p *panel) text(x, y float64, anchor, s string) {
	fmt.Fprintf(p.out, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, s)
}

// axes draws the frame, with marks at the values.
func (p *panel) axes(xs []float64, xLabel func(float64) string, yLabel func(float64) string) {
	fmt.Fprintf(p.out, `<text x="%.1f" y="%.1f" font-weight="bold">%s</text>`+"\n", plotLeft, p.top-10, p.title)
	for i := range 5 {
		v := p.ymax * float64(i) / 4
		fmt.Fprintf(p.out, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#ddd"/>`+"\n", plotLeft, plotWidth-plotRight, p.y(v), p.y(v))
		p.text(plotLeft-8, p.y(v)+4, "end", yLabel(v))
	}
	for _, v := range xs {
		fmt.Fprintf(p.out, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#eee"/>`+"\n", p.x(v), p.x(v), p.top, p.top+panelHeight)
		p.text(p.x(v), p.top+panelHeight+17, "middle", xLabel(v))
	}
	p.text(plotWidth-plotRight, p.top+panelHeight+34, "end", p.xl)
}

func (p *panel) line(xs, ys []float64, colour, dash string) {
	fmt.Fprintf(p.out, `<polyline fill="none" stroke="%s" stroke-width="1.6" stroke-dasharray="%s" points="`, colour, dash)
	for i := range xs {
		fmt.Fprintf(p.out, "%.1f,%.1f ", p.x(xs[i]), p.y(ys[i]))
	}
	p.out.WriteString("\"/>\n")
}

// area fills what lies between two courses.
func (p *panel) area(xs, low, high []float64, colour string) {
	fmt.Fprintf(p.out, `<polygon fill="%s" points="`, colour)
	for i := range xs {
		fmt.Fprintf(p.out, "%.1f,%.1f ", p.x(xs[i]), p.y(high[i]))
	}
	for i := len(xs) - 1; i >= 0; i-- {
		fmt.Fprintf(p.out, "%.1f,%.1f ", p.x(xs[i]), p.y(low[i]))
	}
	p.out.WriteString("\"/>\n")
}

// key draws the legend at the right of a panel's title.
func (p *panel) key(names, colours, dashes []string) {
	x := plotWidth - plotRight
	for i := len(names) - 1; i >= 0; i-- {
		p.text(x, p.top-10, "end", names[i])
		x -= 6.7*float64(len(names[i])) + 8
		fmt.Fprintf(p.out, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="%s" stroke-width="4" stroke-dasharray="%s"/>`+"\n", x-22, x, p.top-14, p.top-14, colours[i], dashes[i])
		x -= 38
	}
}

// drawDay shows GPU use by class, how many jobs wait, and for how long they waited, each beside the plain order.
func drawDay(us, plain *sim.DayReport) []byte {
	out := &bytes.Buffer{}
	height := plotTop + 3*(panelHeight+panelGap)
	fmt.Fprintf(out, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" viewBox="0 0 %.0f %.0f" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">`+"\n", plotWidth, height, plotWidth, height)
	fmt.Fprintf(out, `<rect width="%.0f" height="%.0f" fill="white"/>`+"\n", plotWidth, height)
	fmt.Fprintf(out, `<text x="%.0f" y="26" font-size="16" font-weight="bold">A day of %d jobs: %.1f %% of the GPU time held, %d preemptions, %.2f %% of the work lost</text>`+"\n",
		plotLeft, us.Submitted, us.Allocated, us.Preempted, us.Lost)
	hours := []float64{}
	for h := 0.0; h <= 24; h += 3 {
		hours = append(hours, h)
	}
	hour := func(v float64) string { return fmt.Sprintf("%.0f", v) }
	count := func(v float64) string { return fmt.Sprintf("%.0f", v) }
	course := func(r *sim.DayReport, of func(sim.DayPoint) float64) (xs, ys []float64) {
		for _, p := range r.Course {
			xs, ys = append(xs, p.At/3600), append(ys, of(p))
		}
		return xs, ys
	}
	total := func(p sim.DayPoint) (sum float64) {
		for _, h := range p.Held {
			sum += h
		}
		return sum
	}
	waiting := func(p sim.DayPoint) float64 { return float64(p.Waiting) }
	xs, all := course(us, total)
	plainXs, plainAll := course(plain, total)

	p := &panel{out: out, top: plotTop + 20, xmax: 24, ymax: round(max(slices.Max(all), slices.Max(plainAll))), title: "GPUs held", xl: "hour of the day"}
	p.axes(hours, hour, count)
	low := make([]float64, len(xs))
	for c := range sim.DayClasses {
		_, held := course(us, func(d sim.DayPoint) float64 { return d.Held[c] })
		high := make([]float64, len(xs))
		for i := range high {
			high[i] = low[i] + held[i]
		}
		p.area(xs, low, high, classColours[c])
		low = high
	}
	p.line(plainXs, plainAll, peerColour, "5 3")
	p.key(append(slices.Clone(sim.DayClasses), "plain order, all"), append(slices.Clone(classColours), peerColour), []string{"", "", "", "5 3"})

	xs, queue := course(us, waiting)
	plainXs, plainQueue := course(plain, waiting)
	p = &panel{out: out, top: p.top + panelHeight + panelGap, xmax: 24, ymax: round(max(slices.Max(queue), slices.Max(plainQueue), 4)), title: "Jobs that wait", xl: "hour of the day"}
	p.axes(hours, hour, count)
	p.line(xs, queue, classColours[0], "")
	p.line(plainXs, plainQueue, peerColour, "5 3")
	p.key([]string{"rxvision", "plain order"}, []string{classColours[0], peerColour}, []string{"", "5 3"})

	longest := 10.0
	for _, r := range []*sim.DayReport{us, plain} {
		for _, w := range r.Waits {
			if len(w) > 0 {
				longest = max(longest, w[len(w)-1])
			}
		}
	}
	p = &panel{out: out, top: p.top + panelHeight + panelGap, xmax: longest, ymax: 100, log: true, title: "Waited at most so long, % of jobs", xl: "from submission to the first start (log; dashed: plain order)"}
	marks := slices.DeleteFunc([]float64{1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600}, func(v float64) bool { return v > longest })
	p.axes(marks, shortTime, count)
	for c := range sim.DayClasses {
		for i, r := range []*sim.DayReport{us, plain} {
			if len(r.Waits[c]) == 0 {
				continue
			}
			var xs, ys []float64
			for q := 0.0; q <= 1; q += 1.0 / 500 {
				at := min(len(r.Waits[c])-1, int(q*float64(len(r.Waits[c]))))
				xs, ys = append(xs, r.Waits[c][at]), append(ys, 100*q)
			}
			p.line(xs, ys, classColours[c], []string{"", "5 3"}[i])
		}
	}
	p.key(sim.DayClasses, classColours, []string{"", "", ""})
	out.WriteString("</svg>\n")
	return out.Bytes()
}

// round gives a number of which a quarter is a short one, not below v.
func round(v float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(max(v, 1)))) / 2.5
	return math.Ceil(v/step) * step
}
