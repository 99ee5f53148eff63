/* bcc includes this; no policy needs what would be in it. */
