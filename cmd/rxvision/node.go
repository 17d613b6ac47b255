package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func newNode() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Introduce nodes and gateways to the servers; their GPUs, interruptions, the hold on replacements"}
	cmd.AddCommand(newIntro(), newEnrolled(), newHold(), newNodeGPU(), newInterrupt())
	return cmd
}

func newHold() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use:   "hold",
		Short: "Show whether replacements pause because many nodes fell silent at once, and why",
		Long: `When more nodes fall silent at once than die at once, the fault is more likely between
them and the servers than in them. Then they count as disconnected, not down, and nothing
of what runs there is replaced until enough of them are back, for ten minutes at most, or
until an operator who knows better lets go: rxvision node hold release.`,
		Example: "  rxvision node hold\n  rxvision node hold release",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			h, err := client.Hold(cmd.Context())
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), h)
			}
			if !h.Held {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "replacements go on; disconnected nodes: %d\n", h.Silent)
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "replacements pause since %s UTC: %s\ndisconnected nodes: %d\n", timeText(int64(h.Since)), h.Reason, h.Silent)
			return err
		},
	}
	c.add(cmd)
	var rc clientFlags
	release := &cobra.Command{
		Use:   "release",
		Short: "Let replacements go on: nodes that are still silent count as down",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := rc.client()
			if err != nil {
				return err
			}
			return client.ReleaseHold(cmd.Context())
		},
	}
	rc.add(release)
	cmd.AddCommand(release)
	return cmd
}

func newIntro() *cobra.Command {
	var (
		c        clientFlags
		role     string
		nodeName string
		ttl      time.Duration
		uses     int
		replace  bool
	)
	cmd := &cobra.Command{
		Use:   "intro",
		Short: "Make a token by which an agent or a gateway enrols",
		Long: `Makes an introduction token and prints it, once: the servers keep its hash only. Give
it to an agent or a gateway by a file (--intro-token-file) or by the variable
RXVISION_INTRO_TOKEN, never on a command line, which every user of the host can read.

With it an agent gets its first certificate; from then on it renews that by itself and
needs no token again, unless it was away for longer than a week or is purged. A node's
ID is bound to the node's key: no other token takes it over, except one that is made
with -replace for this.`,
		Example: `  rxvision node intro
  rxvision node intro -node-name gpu-17 -ttl 15m
  rxvision node intro -uses 50 -ttl 8h > token && chmod 600 token
  rxvision node intro -role gateway
  rxvision node intro list
  rxvision node intro delete 1f0c92ab-…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			t, err := client.CreateIntroToken(cmd.Context(), &api.IntroRequest{Role: role, NodeName: nodeName, TTL: ttl.String(), Uses: &uses, Replace: replace})
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), t)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "introduction token %s: %s, %s, until %s UTC\n", t.ID, introFor(t), usesText(t), timeText(t.ExpiresTime))
			_, err = fmt.Fprintln(cmd.OutOrStdout(), t.Secret)
			return err
		},
	}
	c.add(cmd)
	f := cmd.Flags()
	f.StringVar(&role, "role", cluster.RoleNode, "who may enrol with it: node or gateway")
	f.StringVar(&nodeName, "node-name", "", "the one node, by its name, that may use it")
	f.DurationVar(&ttl, "ttl", api.DefaultIntroTTL, "how long it lives, at most 720h")
	f.IntVar(&uses, "uses", 1, "how many nodes or gateways may enrol with it; 0: any number")
	f.BoolVar(&replace, "replace", false, "let it enrol who is enrolled already with another key, as after a reinstallation")
	cmd.AddCommand(newIntroList(), newIntroDelete())
	return cmd
}

func introFor(t *api.IntroToken) string {
	who := "for a " + t.Role
	if t.NodeName != "" {
		who = "for node " + t.NodeName
	}
	if t.Replace {
		who += ", also an enrolled one with another key"
	}
	return who
}

func usesText(t *api.IntroToken) string {
	if t.Uses == 0 {
		return "any number of uses"
	}
	return fmt.Sprintf("%d of %d uses left", t.Uses-t.Used, t.Uses)
}

func newIntroList() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the introduction tokens that have not expired",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			tokens, err := client.IntroTokens(cmd.Context())
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), tokens)
			}
			var rows [][]string
			for _, t := range tokens {
				uses := "any"
				if t.Uses > 0 {
					uses = strconv.Itoa(t.Uses)
				}
				rows = append(rows, []string{t.ID, t.Role, dash(t.NodeName), strconv.Itoa(t.Used) + "/" + uses, strconv.FormatBool(t.Replace), timeText(t.ExpiresTime)})
			}
			return table(cmd.OutOrStdout(), "ID|Role|Node|Used|Replace|Expires (UTC)", rows)
		},
	}
	c.add(cmd)
	return cmd
}

func newIntroDelete() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use:   "delete ID…",
		Short: "Delete introduction tokens; who has enrolled with them stays enrolled",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			var faults []error
			for _, id := range ids {
				faults = append(faults, client.DeleteIntroToken(cmd.Context(), id))
			}
			return errors.Join(faults...)
		},
	}
	c.add(cmd)
	return cmd
}

func newEnrolled() *cobra.Command {
	var (
		c      clientFlags
		revoke []string
	)
	cmd := &cobra.Command{
		Use:   "enrolled",
		Short: "List, or cut off, the nodes and gateways that hold certificates",
		Long: `Lists the nodes and gateways that have enrolled, with the token that introduced them.
With -revoke their certificates are worth nothing to servers any more and are not
renewed; the session of a node ends at once. Purging a node does the same for it.
Workers, which ask no server, serve a revoked gateway until its certificate expires,
within three days.`,
		Example: "  rxvision node enrolled\n  rxvision node enrolled -revoke gateway/g1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			if len(revoke) > 0 {
				var faults []error
				for _, who := range revoke {
					role, name, ok := strings.Cut(who, "/")
					if !ok {
						faults = append(faults, fmt.Errorf("--revoke %q: want node/ID or gateway/NAME", who))
						continue
					}
					faults = append(faults, client.DeleteEnrollment(cmd.Context(), role, name))
				}
				return errors.Join(faults...)
			}
			all, err := client.Enrollments(cmd.Context())
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), all)
			}
			var rows [][]string
			for _, e := range all {
				rows = append(rows, []string{e.Role, e.Name, dash(e.NodeName), timeText(e.CreateTime), short(e.TokenID), short(e.KeyHash)})
			}
			return table(cmd.OutOrStdout(), "Role|Name|Bound to|Since (UTC)|Token|Key", rows)
		},
	}
	c.add(cmd)
	cmd.Flags().StringSliceVar(&revoke, "revoke", nil, "node/ID or gateway/NAME to cut off; may be given several times")
	return cmd
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
