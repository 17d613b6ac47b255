package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

func newJobExplain() *cobra.Command {
	var (
		c         clientFlags
		namespace string
	)
	cmd := &cobra.Command{
		Use: "explain JOB", Short: "Say why a job waits: its place in the queue, what it lacks, who holds that, when it can start", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			x, err := client.Explain(cmd.Context(), namespaceOr(namespace), args[0])
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), x)
			}
			return newTeller(cmd.OutOrStdout(), x, false).tell()
		},
	}
	c.add(cmd)
	addNamespace(cmd, &namespace)
	return cmd
}

func newJobWhatIf() *cobra.Command {
	var (
		c         clientFlags
		namespace string
		priority  int
		vars      []string
		varFiles  []string
	)
	cmd := &cobra.Command{
		Use:   "what-if FILE",
		Short: "Say where a job would go and whom it would preempt, registering nothing",
		Long: `Parses the job file as job run does and asks the servers where each allocation would go, what would be
preempted for it, and what would wait and why. Nothing is registered. FILE - is standard input.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			src, err := readJobFile(args[0])
			if err != nil {
				return err
			}
			job, _, err := jobspec.Parse(args[0], src, jobspec.ParseOptions{Vars: vars, VarFiles: varFiles, Env: os.Environ(), AllowFS: true})
			if err != nil {
				return err
			}
			if priority != 0 {
				job.Priority = &priority
			}
			x, err := client.WhatIf(cmd.Context(), namespaceOr(namespace), job)
			if err != nil {
				return err
			}
			if x.Warnings != "" {
				fmt.Fprintln(cmd.ErrOrStderr(), x.Warnings)
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), x)
			}
			return newTeller(cmd.OutOrStdout(), x.Explanation, true).tell()
		},
	}
	c.add(cmd)
	addNamespace(cmd, &namespace)
	cmd.Flags().IntVar(&priority, "priority", 0, "as if the job had this priority")
	cmd.Flags().StringArrayVar(&vars, "var", nil, "NAME=VALUE for a variable of the job file")
	cmd.Flags().StringArrayVar(&varFiles, "var-file", nil, "file of variables")
	return cmd
}

func addNamespace(cmd *cobra.Command, namespace *string) {
	cmd.Flags().StringVar(namespace, "namespace", "", "the job's namespace; default: NOMAD_NAMESPACE, then default")
}

func namespaceOr(flag string) string { return cmp.Or(flag, os.Getenv("NOMAD_NAMESPACE")) }

// teller puts an explanation into words.
type teller struct {
	w      io.Writer
	x      *cluster.Explanation
	whatIf bool
	colour bool
	fault  error
}

func newTeller(w io.Writer, x *cluster.Explanation, whatIf bool) *teller {
	return &teller{w: w, x: x, whatIf: whatIf, colour: isTerminal(w)}
}

// screen is how wide lines of text are at most, in characters.
const screen = 80

const (
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	red    = "\x1b[31m"
)

// say writes a sentence under a heading, wrapped; colour is of the heading.
func (t *teller) say(colour, head, format string, args ...any) {
	indent := strings.Repeat(" ", 11)
	text := fmt.Sprintf(format, args...)
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len([]rune(line))+1+len([]rune(word)) > screen-len(indent) {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	label := fmt.Sprintf("%-11s", head)
	if t.colour && colour != "" {
		label = colour + label + "\x1b[0m"
	}
	t.print("%s%s\n", label, strings.Join(append(lines, line), "\n"+indent))
}

func (t *teller) print(format string, args ...any) {
	if _, err := fmt.Fprintf(t.w, format, args...); err != nil && t.fault == nil {
		t.fault = err
	}
}

func (t *teller) table(heading string, rows [][]string) {
	if len(rows) == 0 || t.fault != nil {
		return
	}
	t.print("\n")
	t.fault = cmp.Or(t.fault, table(t.w, heading, rows))
}

func (t *teller) tell() error {
	x := t.x
	t.say("", "Job:", "%s, %s, priority %d%s", x.JobID, x.Type, x.Priority, t.ofStatus())
	if x.Spawns != "" {
		t.say("", "", "It is %s: only its children run.", x.Spawns)
		if !t.whatIf {
			return t.fault
		}
	}
	for _, g := range x.Groups {
		t.group(g)
	}
	if len(x.Groups) == 0 && x.Stop {
		t.say("", "Stopped:", "nothing of it runs.")
	}
	t.queue()
	for _, w := range x.Waits {
		t.wait(w)
	}
	t.quota()
	for _, g := range x.Groups {
		t.start(g)
		t.preemption(g)
	}
	t.tables()
	return t.fault
}

func (t *teller) ofStatus() string {
	switch x := t.x; {
	case t.whatIf && x.Status == "":
		return "; it is new"
	case t.whatIf:
		return fmt.Sprintf("; it is there and %s, this would be its version %d", x.Status, x.Version)
	case x.Stop:
		return ", stopped"
	default:
		return ", " + x.Status
	}
}

// of names a group where the job has several.
func (t *teller) of(g *cluster.GroupStanding) string {
	if len(t.x.Groups) > 1 {
		return " of group " + g.Name
	}
	return ""
}

func (t *teller) group(g *cluster.GroupStanding) {
	if n := g.Running + g.Starting; n > 0 {
		state := ""
		if g.Starting > 0 {
			state = fmt.Sprintf(" (%d starting)", g.Starting)
		}
		t.say(green, "Runs:", "%d of %d allocations%s%s %s.", n, g.Desired, t.of(g), state, places(g))
	}
	for _, c := range []struct {
		n    int
		what string
	}{{g.Done, "done"}, {g.Ending, "about to end"}, {g.Unknown, "on nodes that are not heard of"}, {g.Failed, "failed"}} {
		if c.n > 0 {
			t.say("", "", "%s%s %s.", count(c.n, "allocation"), t.of(g), c.what)
		}
	}
	claims := 0
	for _, s := range g.Places {
		if s.Claim {
			claims++
		}
	}
	placed := len(g.Places) + g.MorePlaces - claims
	if placed > 0 {
		verb := "would be"
		if !t.whatIf {
			verb = "are about to be"
		}
		t.say(green, "Places:", "%s%s %s placed.", count(placed, "allocation"), t.of(g), verb)
	}
	if claims > 0 {
		t.say(yellow, "Places:", "%s%s once others have left.", count(claims, "allocation"), t.of(g))
	}
	if rest := g.Queued - claims; rest > 0 {
		t.say(yellow, "Waits:", "%d of %d allocations%s %s.", rest, g.Desired, t.of(g), lacks(g))
		if c := g.Nodes; c != nil && (g.Failure != nil || c.Total == 0) {
			t.say("", "Nodes:", "%s.", nodes(g, c))
		}
		for _, f := range g.Filters {
			t.say("", "", "%s: %s%s", count(f.Nodes, "node"), f.Reason, among(f.Examples))
		}
		if n := len(g.Unfit) + g.MoreUnfit; n > 0 {
			why := ""
			if len(g.Unfit) > 0 {
				u := g.Unfit[0]
				why = fmt.Sprintf(", such as %s on %s: %s", u.DeviceID, u.NodeName, strings.Trim(u.Order+" "+u.Why, " "))
			}
			t.say("", "", "%s it could use %s out of use%s.", count(n, "device"), are(n), why)
		}
	}
}

func places(g *cluster.GroupStanding) string {
	var on []string
	for _, n := range g.Runs {
		name := cmp.Or(n.NodeName, short(n.NodeID))
		if n.Allocs > 1 {
			name += fmt.Sprintf(" (%d)", n.Allocs)
		}
		on = append(on, name)
	}
	if g.MoreRuns > 0 {
		on = append(on, count(g.MoreRuns, "more node"))
	}
	since := cluster.Time(0)
	for _, n := range g.Runs {
		if since == 0 || n.Since < since {
			since = n.Since
		}
	}
	return fmt.Sprintf("on %s, since %s", strings.Join(on, ", "), clock(since))
}

// lacks says in short what a group has too little of.
func lacks(g *cluster.GroupStanding) string {
	switch {
	case g.Failure == nil:
		return "wait for their turn"
	case len(g.Failure.QuotaExhausted) > 0:
		return "are over the quota"
	case len(g.Shortages) == 0:
		return "find no node"
	}
	var what []string
	for _, s := range g.Shortages {
		switch s.Unit {
		case "":
			what = append(what, s.What)
		case "devices":
			what = append(what, fmt.Sprintf("%d %s", s.Asked, s.What))
		case "milli":
			what = append(what, fmt.Sprintf("%d thousandths of a %s", s.Asked, s.What))
		default:
			what = append(what, fmt.Sprintf("%d %s of %s", s.Asked, s.Unit, s.What))
		}
	}
	gang := ""
	if g.Gang {
		gang = ", all at once"
	}
	return "lack " + strings.Join(what, ", ") + gang
}

func nodes(g *cluster.GroupStanding, c *cluster.NodeCounts) string {
	var out []string
	add := func(n int, what string) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, what))
		}
	}
	add(c.Full, "full")
	add(c.Free, "with room for one more")
	add(c.Filtered, "that cannot run it")
	for _, why := range sortedKeys(c.NotReady) {
		add(c.NotReady[why], why)
	}
	add(c.OtherPool, "in other pools")
	add(c.OtherCenter, "in other datacenters")
	if len(out) == 0 {
		return "there are none"
	}
	return fmt.Sprintf("of %d: %s", c.Total, strings.Join(out, ", "))
}

func among(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return " (" + strings.Join(names, ", ") + ")"
}

func (t *teller) queue() {
	q := t.x.Queue
	if q == nil {
		return
	}
	switch {
	case q.Paused:
		t.say(red, "Queue:", "scheduling is paused: nomad operator scheduler set-config -pause-eval-broker=false")
	case q.WaitUntil > 0:
		t.say(yellow, "Queue:", "it is looked at again at %s.", clock(q.WaitUntil))
		return
	case q.Planning:
		t.say(yellow, "Queue:", "it is being planned at this moment.")
	}
	state := "it has not been tried yet"
	if q.Blocked {
		state = "it was tried, and is again when room appears"
	}
	if q.Of > 0 {
		t.say(yellow, "Queue:", "position %d of %d; %d of %d in its priority, %d of %d in its namespace; %s.",
			q.Position, q.Of, q.InPriority, q.OfPriority, q.InNamespace, q.OfNamespace, state)
	}
}

func (t *teller) wait(w *cluster.Wait) {
	group := ""
	if w.Group != "" && len(t.x.Groups) > 1 {
		group = "group " + w.Group + ": "
	}
	switch w.Kind {
	case cluster.WaitPaused:
		if t.x.Queue == nil {
			t.say(red, "Paused:", "scheduling is paused: nomad operator scheduler set-config -pause-eval-broker=false")
		}
	case cluster.WaitHold:
		t.say(red, "Held:", "replacements are held: %s", w.Why)
	case cluster.WaitQuota: // told with the quota
	case cluster.WaitEnds:
		t.say(yellow, "Waits:", "for the end of what it replaces.")
	case cluster.WaitDelay:
		t.say(yellow, "Waits:", "%suntil %s: %s.", group, clock(w.Until), strings.TrimPrefix(w.Why, "created for "))
	case cluster.WaitClaims:
		var who []string
		for _, v := range w.Awaits {
			who = append(who, victimName(v))
		}
		if w.More > 0 {
			who = append(who, count(w.More, "more allocation"))
		}
		t.say(yellow, "Waits:", "%sfor the end of %s.", group, strings.Join(who, ", "))
	case cluster.WaitPromote:
		t.say(yellow, "Waits:", "%scanaries wait for their promotion: nomad deployment promote %s", group, short(w.ID))
	case cluster.WaitHealth:
		t.say(yellow, "Waits:", "%sfor health in deployment %s: %s", group, short(w.ID), w.Why)
	case cluster.WaitHalted:
		t.say(red, "Halted:", "deployment %s is %s", short(w.ID), w.Why)
	default:
		t.say(yellow, "Waits:", "%s%s", group, w.Why)
	}
}

func (t *teller) quota() {
	q := t.x.Quota
	if q == nil || len(q.Exceeded) == 0 {
		return
	}
	t.say(yellow, "Quota:", "%s: %s.", q.Quota, strings.Join(q.Exceeded, ", "))
}

func (t *teller) start(g *cluster.GroupStanding) {
	s := g.Start
	if s == nil || g.Failure != nil && len(g.Failure.QuotaExhausted) > 0 {
		return
	}
	var who []string
	for _, h := range s.Because {
		who = append(who, t.holderName(h))
	}
	if len(who) > 4 {
		who = append(who[:3], fmt.Sprintf("%d more", len(who)-3))
	}
	list := strings.Join(who, ", ")
	switch {
	case s.Now:
		t.say(green, "Start:", "now%s.", t.of(g))
	case s.Never:
		t.say(red, "Start:", "never%s: the nodes that are there could not hold it if they were empty.", t.of(g))
	case s.At > 0 && list == "":
		t.say(yellow, "Start:", "by %s%s, when those have left that it waits for.", clock(s.At), t.of(g))
	case s.At > 0:
		t.say(yellow, "Start:", "not before %s%s, when the declared run time of %s is over.", clock(s.At), t.of(g), list)
	case list != "":
		t.say(yellow, "Start:", "unknown%s: what it lacks is held by %s, without a declared run time.", t.of(g), list)
	default:
		t.say(yellow, "Start:", "unknown%s.", t.of(g))
	}
}

func (t *teller) holderName(h *cluster.Holder) string {
	switch {
	case h.Hidden:
		return count(max(h.Jobs, 1), "job") + " of other namespaces"
	case h.Own:
		return "this job"
	case h.Namespace != t.x.Namespace:
		return h.JobID + "@" + h.Namespace
	}
	return h.JobID
}

func victimName(v *cluster.Victim) string {
	if v.Hidden {
		return "an allocation of another namespace"
	}
	return v.Name
}

// preemption says what preempting could do, or would.
func (t *teller) preemption(g *cluster.GroupStanding) {
	p := g.Preempt
	if p == nil || !p.Helps {
		return
	}
	jobs, n := map[string]bool{}, 0
	for _, v := range p.Victims {
		n++
		if v.Hidden {
			jobs["others"] = true
		} else {
			jobs[v.JobID] = true
		}
	}
	var ways []string
	for _, o := range p.Obstacles {
		ways = append(ways, obstacleText(o, t.x.Priority))
	}
	t.say("", "Preempt:", "without %s of %s there would be room. In the way: %s.", count(n, "allocation"), strings.Join(sortedKeys(jobs), ", "), strings.Join(ways, "; "))
}

func obstacleText(o *cluster.Obstacle, priority int) string {
	switch o.Kind {
	case cluster.ObstaclePriority:
		return fmt.Sprintf("the priority of %d is not at least 10 below %d", o.Allocs, priority)
	case cluster.ObstacleNever:
		return fmt.Sprintf(`rx_preemptible = "false" of %d`, o.Allocs)
	case cluster.ObstacleMinRuntime:
		return fmt.Sprintf("rx_min_runtime of %d until %s", o.Allocs, clock(o.Until))
	case cluster.ObstacleSystem:
		return fmt.Sprintf("%d of system jobs", o.Allocs)
	case cluster.ObstacleSwitch:
		return fmt.Sprintf("preemption is off for %s jobs (nomad operator scheduler set-config -preempt-%s-scheduler=true)", o.What, o.What)
	case cluster.ObstacleAllAtOnce:
		return "a job with all_at_once preempts nothing"
	case cluster.ObstacleType:
		return "jobs of type " + o.What + " preempt nothing"
	case cluster.ObstacleEnding:
		return fmt.Sprintf("%d about to end", o.Allocs)
	}
	return o.Kind
}

func (t *teller) tables() {
	for _, g := range t.x.Groups {
		t.seats(g)
		var rows [][]string
		for _, s := range g.Shortages {
			if s.Unit != "" {
				rows = append(rows, []string{clipped(s.What, 30), s.Unit, amount(s.Asked), strconv.Itoa(s.Nodes), amount(s.Most), amount(s.Free), amount(s.Total)})
			}
		}
		t.table("SHORT OF|UNIT|ASKED|NODES|MOST ON ONE|FREE|OF", rows)
		rows = nil
		for _, h := range g.Holders {
			rows = append(rows, t.holder(h))
		}
		if o := g.Others; o != nil {
			row := t.holder(o)
			row[0] = count(o.Jobs, "more job")
			rows = append(rows, row)
		}
		t.table("HELD BY|PRIO|ALLOCS|HOLDS|SINCE|ENDS|SHIELD", rows)
	}
	t.victims()
	t.quotaTable()
}

func (t *teller) seats(g *cluster.GroupStanding) {
	var rows [][]string
	for _, s := range g.Places {
		var devices []string
		for _, d := range s.Devices {
			devices = append(devices, fmt.Sprintf("%d %s", d.Ordinal, clipped(d.ID, 20)))
			if d.Milli > 0 || d.MiB > 0 {
				devices = append(devices, fmt.Sprintf("  %d/1000, %d MiB", d.Milli, d.MiB))
			}
		}
		when, score := "now", "-"
		if s.Claim {
			when = fmt.Sprintf("after %d", s.Awaits)
		}
		if len(s.Scores) > 0 {
			score = fmt.Sprintf("%.3f", float64(s.Scores[0].Norm)/1000)
		}
		first := "-"
		if len(devices) > 0 {
			first = devices[0]
		}
		rows = append(rows, []string{clipped(s.Name, 20), clipped(cmp.Or(s.NodeName, short(s.NodeID)), 12), when, score, first})
		for _, d := range devices[min(1, len(devices)):] {
			rows = append(rows, []string{"", "", "", "", d})
		}
	}
	if g.MorePlaces > 0 {
		rows = append(rows, []string{fmt.Sprintf("%d more", g.MorePlaces), "", "", "", ""})
	}
	t.table("PLACE|NODE|WHEN|SCORE|DEVICES", rows)
}

// holder is a row of who holds what is short; of several things the most telling one.
func (t *teller) holder(h *cluster.Holder) []string {
	holds := "-"
	switch {
	case h.Milli > 0:
		holds = devicesText(h.Milli)
	case h.CPU > 0:
		holds = amount(h.CPU) + " MHz"
	case h.MemoryMB > 0:
		holds = amount(h.MemoryMB) + " MiB"
	case h.DiskMB > 0:
		holds = amount(h.DiskMB) + " MiB"
	case h.Ports > 0:
		holds = count(h.Ports, "port")
	}
	name := t.holderName(h)
	if h.Hidden {
		name = count(max(h.Jobs, 1), "other")
	}
	shield := fmt.Sprintf("%d of %d", h.Allocs-h.Preemptible, h.Allocs)
	switch {
	case h.Claim:
		shield = "claim"
	case h.Reserved:
		shield = "reserved"
	case h.Preemptible == h.Allocs:
		shield = "none"
	case h.Preemptible == 0 && len(h.Obstacles) == 1:
		shield = shieldWord(h.Obstacles[0].Kind)
	}
	return []string{clipped(name, 16), strconv.Itoa(h.Priority), strconv.Itoa(h.Allocs), holds, clock(h.Since), clock(h.Until), shield}
}

func shieldWord(kind string) string {
	switch kind {
	case cluster.ObstacleNever:
		return "never"
	case cluster.ObstacleMinRuntime:
		return "runtime"
	}
	return kind
}

func (t *teller) victims() {
	var rows [][]string
	for _, v := range t.x.Preempts {
		from := "its start"
		if v.Checkpoint != nil {
			from = fmt.Sprintf("step %d", v.Checkpoint.Step)
		}
		rows = append(rows, []string{
			clipped(victimName(v), 20), strconv.Itoa(v.Priority), clipped(cmp.Or(v.NodeName, "-"), 12), devicesText(v.Milli),
			fmt.Sprintf("%s since %s", time.Duration(v.LostSeconds)*time.Second, from),
		})
	}
	t.table("PREEMPTS|PRIO|NODE|DEVICES|WORK LOST", rows)
}

func (t *teller) quotaTable() {
	q := t.x.Quota
	if q == nil || len(q.Exceeded) == 0 && !t.whatIf {
		return
	}
	var rows [][]string
	for _, l := range q.Lines {
		text := amount
		if l.Whole {
			text = func(n int64) string { return devicesText(n) }
		}
		rows = append(rows, []string{clipped(l.Name, 30), text(l.Used), text(l.Limit), text(l.Ceiling)})
	}
	t.table("QUOTA "+strings.ToUpper(clipped(q.Quota, 20))+"|USED|LIMIT|WITH LOANS", rows)
	rows = nil
	for _, u := range q.Namespaces {
		name := u.Namespace
		if u.Hidden {
			name = "another namespace"
		}
		rows = append(rows, []string{clipped(name, 30), strconv.FormatInt(u.Allocs, 10)})
	}
	t.table("USED BY|ALLOCS", rows)
}

func amount(n int64) string { return strconv.FormatInt(n, 10) }

// devicesText renders thousandths of devices.
func devicesText(milli int64) string {
	if milli%1000 == 0 {
		return amount(milli / 1000)
	}
	return strings.TrimRight(fmt.Sprintf("%d.%03d", milli/1000, milli%1000), "0")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func are(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

func clipped(s string, most int) string {
	if r := []rune(s); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return s
}

// clock is a time of today's, else with its date, in UTC.
func clock(at cluster.Time) string {
	if at == 0 {
		return "-"
	}
	u := at.Std().UTC()
	if y, m, d := u.Date(); [3]int{y, int(m), d} == today() {
		return u.Format("15:04:05")
	}
	return u.Format("01-02 15:04")
}

func today() [3]int {
	y, m, d := time.Now().UTC().Date()
	return [3]int{y, int(m), d}
}
